"""Train a SentencePiece tokenizer: python tools/train_tokenizer.py --input TEXT --vocab-size N --output-prefix PREFIX

Writes PREFIX.model and PREFIX.vocab. Ids 0 to 4 are <s>, pad, </s>, unk and [MASK], or with --t5 ids 0 to 2 pad, </s>
and unk; sentinels come later, by --vocab-extra-ids. The same text gives the same bytes.
"""

import sys
from pathlib import Path

from megatron_metro.config.errors import exit_on_error
from megatron_metro.config.files import check_writable
from megatron_metro.config.parser import Parser, number, whole_number
from megatron_metro.data.vocabulary_training import VocabularyOptions, train_vocabulary, write_vocabulary


def _build_parser() -> Parser:
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("--input", nargs="+", required=True, help="files, folders or patterns; JSON lines or plain text")
    flag("--output-prefix", required=True, metavar="PREFIX", help="where to write, without .model")
    flag("--vocab-size", type=whole_number(6), default=32768, metavar="N", help="pieces, sentinels not counted")
    flag("--allow-smaller-vocab", action="store_true", help="take fewer pieces where the text is small")
    flag("--json-key", default="text", metavar="KEY", help="key of the text in a JSON line")
    flag("--uncased", action="store_true", help="fold case, as METRO's vocabulary of 32,768 pieces does")
    flag("--t5", action="store_true", help="reserve T5's ids instead of METRO's; sentinels then count down")
    flag(
        "--character-coverage", type=number(0.98, 1), default=0.999995, metavar="X",
        help="share of characters with a piece",
    )  # fmt: skip
    flag("--max-sentences", type=whole_number(1), default=2_000_000, metavar="N", help="lines sampled from longer text")
    return parser


def main() -> None:
    """Train and write."""
    with exit_on_error():
        flags = _build_parser().read(sys.argv[1:])
        options = VocabularyOptions(
            inputs=tuple(flags.input),
            json_key=flags.json_key,
            vocab_size=flags.vocab_size,
            is_cased=not flags.uncased,
            character_coverage=flags.character_coverage,
            max_sentences=flags.max_sentences,
            allow_smaller_vocab=flags.allow_smaller_vocab,
            is_t5=flags.t5,
        )
        check_writable(Path(flags.output_prefix).parent, "--output-prefix")  # training may take an hour
        path, num_pieces = write_vocabulary(train_vocabulary(options), flags.output_prefix)
        sys.stdout.write(f"{path}: {num_pieces} pieces\n")


if __name__ == "__main__":
    main()
