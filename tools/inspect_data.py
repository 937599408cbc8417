"""Show what a run would train on: python tools/inspect_data.py [--num-samples N] [--part valid] [--verify] [flags]

The flags are those of pretrain.py; --data-path, --tokenizer-model and the objective's matter. --verify also reads every
byte of every data set and compares it with the manifest and the vocabulary.
"""

import sys
from dataclasses import replace

from megatron_metro.checkpoint.start import read_saved_settings
from megatron_metro.config.cli import parse_run
from megatron_metro.config.errors import DataError, exit_on_error
from megatron_metro.config.parser import Parser, whole_number
from megatron_metro.data.inspection import describe_samples
from megatron_metro.data.loader import build_loaders
from megatron_metro.tokenizer import load_tokenizer


def _build_parser() -> Parser:
    """This tool's flags; all others describe the run."""
    parser = Parser(description=__doc__)
    parser.add_argument("--num-samples", type=whole_number(1), default=2, metavar="N", help="samples to show")
    parser.add_argument("--part", choices=("train", "valid"), default="train", help="which documents")
    parser.add_argument("--verify", action="store_true", help="check every byte first")
    return parser


def main() -> None:
    """Open the data of a run and print."""
    parser = _build_parser()
    with exit_on_error():
        own, argv = parser.read_own(sys.argv[1:])
        run = parse_run(argv, None, parser.list_flags(), read_saved_settings)
        run = replace(run, data=replace(run.data, num_workers=0))
        tokenizer = load_tokenizer(run.tokenizer, run.model.vocab_size)
        train, valid = build_loaders(run, tokenizer, dp_rank=0, dp_size=1)
        loader = train if own.part == "train" else valid
        if loader is None:
            raise DataError(f"--part {own.part} has no documents; see --split and --eval-iters")
        for source in loader.mixture.sources if own.verify else ():
            source.verify(tokenizer.sha256)
        for line in (*loader.mixture.describe(), *describe_samples(loader, tokenizer, own.num_samples)):
            sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
