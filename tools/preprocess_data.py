"""Tokenise text: python tools/preprocess_data.py --input TEXT --output-prefix PREFIX --tokenizer-model T.model

Writes PREFIX_text_document.bin, .idx and .json. Input is JSON lines (plain, .gz, .zst) or plain text, whose paragraphs
are joined to documents of 2,000 characters or more.
"""

import argparse
import sys

from megatron_metro.config.errors import exit_on_error
from megatron_metro.config.parser import Parser, whole_number
from megatron_metro.config.schema import TokenizerConfig
from megatron_metro.data.preprocess import PreprocessOptions, preprocess
from megatron_metro.data.progress import show_progress
from megatron_metro.tokenizer import load_tokenizer


def _build_parser() -> Parser:
    parser = Parser(description=__doc__)
    flag, count = parser.add_argument, {"type": whole_number(1), "metavar": "N"}
    flag("--input", nargs="+", required=True, help="files, folders or patterns")
    flag("--json-keys", nargs="+", default=["text"], help="keys to tokenise, one data set each (default: text)")
    flag("--output-prefix", required=True, metavar="PREFIX", help="where to write, without _<key>_document")
    flag("--workers", **count, default=1, help="processes; the bytes written do not depend on it")
    flag("--append-eod", action=argparse.BooleanOptionalAction, default=True, help="</s> after each document")
    flag("--split-lines", action="store_true", help="one sequence and </s> per line, for --block-mode complete_doc")
    flag("--on-error", choices=("fail", "skip"), default="fail", help="what to do about lines that give no document")
    flag("--tokenizer-type", choices=("SentencePieceTokenizer", "NullTokenizer"), help="found from --tokenizer-model")
    flag("--tokenizer-model", metavar="FILE", help="SentencePiece .model file")
    flag("--vocab-size", **count, help="ids of the NullTokenizer, sentinels included")
    flag("--vocab-extra-ids", **count, default=512, help="sentinels of the run; they take no part in text")
    flag("--pre-tokenizer", choices=("none", "metro", "metro-lower"), default="none", help="that of the run")
    flag("--log-interval", **count, default=100_000, help="documents between lines where there is no terminal")
    flag("--partitions", **count, help="ignored: any number of --workers fills one output")
    return parser


def main() -> None:
    """Tokenise, show progress, report the rate."""
    with exit_on_error():
        flags = vars(_build_parser().read(sys.argv[1:]))
        names = ("tokenizer_type", "tokenizer_model", "vocab_extra_ids", "pre_tokenizer")
        tokenizer = load_tokenizer(TokenizerConfig(**{name: flags[name] for name in names}), flags["vocab_size"])
        options = PreprocessOptions(
            inputs=tuple(flags["input"]),
            json_keys=tuple(flags["json_keys"]),
            num_workers=flags["workers"],
            **{name: flags[name] for name in ("output_prefix", "append_eod", "split_lines", "on_error")},
        )
        with show_progress(options.inputs, flags["log_interval"], sys.stderr) as on_progress:
            report = preprocess(options, tokenizer, on_progress)
        for line in report.bad_lines:
            sys.stderr.write(f"skipped: {line.place} {line.cause}\n")
        sys.stdout.write(f"{' '.join(report.prefixes)}: {report.summarise()}\n")


if __name__ == "__main__":
    main()
