"""Train a SentencePiece tokenizer: python tools/train_tokenizer.py --input TEXT --vocab-size N --output-prefix PREFIX

Writes PREFIX.model and PREFIX.vocab. Ids 0 to 4 are <s>, pad, </s>, unk and [MASK]; sentinels come later, by
--vocab-extra-ids. The same text gives the same bytes.
"""

import argparse
import sys

from megatron_metro.config.errors import exit_on_error
from megatron_metro.data.vocabulary_training import VocabularyOptions, train_vocabulary, write_vocabulary


def _parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", nargs="+", required=True, help="files, folders or patterns; JSON lines or plain text"
    )
    parser.add_argument("--output-prefix", required=True, help="where to write, without .model")
    parser.add_argument("--vocab-size", type=int, default=32768, help="pieces, sentinels not counted")
    parser.add_argument("--allow-smaller-vocab", action="store_true", help="take fewer pieces where the text is small")
    parser.add_argument("--json-key", default="text", help="key of the text in a JSON line")
    parser.add_argument("--uncased", action="store_true", help="fold case, as METRO's vocabulary of 32,768 pieces does")
    parser.add_argument("--character-coverage", type=float, default=0.999995, help="share of characters with a piece")
    parser.add_argument("--max-sentences", type=int, default=2_000_000, help="lines sampled from longer text")
    return parser.parse_args()


def main() -> None:
    """Train and write."""
    flags = _parse_flags()
    with exit_on_error():
        options = VocabularyOptions(
            inputs=tuple(flags.input),
            json_key=flags.json_key,
            vocab_size=flags.vocab_size,
            is_cased=not flags.uncased,
            character_coverage=flags.character_coverage,
            max_sentences=flags.max_sentences,
            allow_smaller_vocab=flags.allow_smaller_vocab,
        )
        path, num_pieces = write_vocabulary(train_vocabulary(options), flags.output_prefix)
        sys.stdout.write(f"{path}: {num_pieces} pieces\n")


if __name__ == "__main__":
    main()
