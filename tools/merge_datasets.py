"""Join token files: python tools/merge_datasets.py --input FOLDER --output-prefix PREFIX

Writes PREFIX.bin, .idx and .json with the documents of every data set in FOLDER, in the order of their names. All must
have been made with one tokenizer; every byte is checked against the manifests on the way.
"""

import sys

from megatron_metro.config.errors import exit_on_error
from megatron_metro.config.parser import Parser
from megatron_metro.data.merging import find_stores, merge_stores


def main() -> None:
    """Find, check and join."""
    parser = Parser(description=__doc__)
    parser.add_argument("--input", required=True, metavar="FOLDER", help="folder of .bin and .idx files")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="where to write, without .bin")
    with exit_on_error():
        flags = parser.read(sys.argv[1:])
        report = merge_stores(find_stores(flags.input), flags.output_prefix)
        counts = "no manifest"
        if report.manifest is not None:
            counts = f"{report.manifest.num_documents} documents, {report.manifest.num_tokens} tokens"
        sys.stdout.write(f"{flags.output_prefix}: {counts}, from {' '.join(report.prefixes)}\n")


if __name__ == "__main__":
    main()
