"""Training a SentencePiece vocabulary, unigram over NFKC text, with METRO's reserved ids 0 to 4 or T5's 0 to 2."""

import io
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_metro.config.errors import ConfigError, DataError
from megatron_metro.config.files import write_atomically
from megatron_metro.data.corpus import BadLine, find_inputs, parse_chunk, read_chunks
from megatron_metro.tokenizer import MASK_PIECE, Vocabulary

MAX_SENTENCE_BYTES = 4000  # SentencePiece would leave out longer ones without a word
MAX_PIECE_LENGTH = 32
# The result depends on the number of threads (it fixes the order of sums), so that is a constant.
NUM_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyOptions:
    """What to learn a vocabulary from, and how large; sentinels are appended later and not counted."""

    inputs: tuple[str, ...]
    json_key: str = "text"
    vocab_size: int = 32768
    is_cased: bool = True  # False folds case, as METRO's 32k vocabulary
    character_coverage: float = 0.999995
    max_sentences: int = 2_000_000  # a fixed random sample of so many lines is used
    allow_smaller_vocab: bool = False  # take what a small text gives
    is_t5: bool = False  # T5's reserved ids instead of METRO's


def train_vocabulary(options: VocabularyOptions) -> bytes:
    """The bytes of a SentencePiece model; the same inputs give the same bytes. ConfigError, DataError."""
    _check_options(options)
    sentences = _sample(_read_sentences(options), options.max_sentences)
    if not sentences:
        raise DataError(f"--input {' '.join(options.inputs)} holds no text")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="unigram",
            vocab_size=options.vocab_size,
            hard_vocab_limit=not options.allow_smaller_vocab,
            character_coverage=options.character_coverage,
            normalization_rule_name="nmt_nfkc" if options.is_cased else "nmt_nfkc_cf",
            max_sentencepiece_length=MAX_PIECE_LENGTH,
            max_sentence_length=2 * MAX_SENTENCE_BYTES,
            num_threads=NUM_THREADS,
            minloglevel=2,
            bos_piece="<s>",
            pad_piece="<pad>",
            eos_piece="</s>",
            unk_piece="<unk>",
            **_reserve_ids(options.is_t5),
        )
    except (RuntimeError, ValueError) as error:
        raise _explain(error, options.vocab_size) from error
    return model.getvalue()


def _reserve_ids(is_t5: bool) -> dict[str, Any]:
    """Special ids in SentencePiece's words; -1 is none."""
    vocabulary = (Vocabulary.t5 if is_t5 else Vocabulary)(num_pieces=0, num_sentinels=0)
    return {
        "bos_id": -1 if vocabulary.bos_id is None else vocabulary.bos_id,
        "pad_id": vocabulary.pad_id,
        "eos_id": vocabulary.eos_id,
        "unk_id": vocabulary.unk_id,
        # A control symbol has an id and is never found in text.
        "control_symbols": [] if vocabulary.mask_id is None else [MASK_PIECE],
    }


def write_vocabulary(model: bytes, output_prefix: str) -> tuple[Path, int]:
    """Write `<prefix>.model`, and `<prefix>.vocab` for readers; returns the path of the model and its pieces."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    rows = (f"{processor.id_to_piece(i)}\t{processor.get_score(i):.6g}\n" for i in range(len(processor)))
    write_atomically(Path(f"{output_prefix}.vocab"), "".join(rows).encode())
    path = Path(f"{output_prefix}.model")
    write_atomically(path, model)
    return path, len(processor)


def _read_sentences(options: VocabularyOptions) -> Iterator[str]:
    for chunk in read_chunks(find_inputs(options.inputs)):
        for found in parse_chunk(chunk, (options.json_key,)):
            if isinstance(found, BadLine):
                raise DataError(f"{found.place} {found.cause}")
            for line in found.texts[0].splitlines():
                yield from _cut_sentence(line.strip())


def _cut_sentence(line: str) -> Iterator[str]:
    """A line in pieces that SentencePiece accepts, cut at blanks where there are any."""
    while len(line.encode()) > MAX_SENTENCE_BYTES:
        # A character has at most four bytes.
        cut = line.rfind(" ", 1, MAX_SENTENCE_BYTES // 4)
        cut = MAX_SENTENCE_BYTES // 4 if cut < 0 else cut
        yield line[:cut]
        line = line[cut:].lstrip()
    if line:
        yield line


def _sample(sentences: Iterable[str], size: int) -> list[str]:
    """At most `size` of the sentences, each equally likely (reservoir sampling with a fixed seed)."""
    generator = random.Random(0)
    sample: list[str] = []
    for count, sentence in enumerate(sentences):
        if count < size:
            sample.append(sentence)
        elif (place := int(generator.random() * (count + 1))) < size:
            sample[place] = sentence
    return sample


def _check_options(options: VocabularyOptions) -> None:
    num_reserved = (Vocabulary.t5 if options.is_t5 else Vocabulary)(num_pieces=0, num_sentinels=0).first_text_id
    if not num_reserved < options.vocab_size < 2**31:
        raise ConfigError(f"--vocab-size {options.vocab_size}: {num_reserved} ids are reserved; give more, below 2^31")
    if not 0.98 <= options.character_coverage <= 1.0:
        raise ConfigError(f"--character-coverage {options.character_coverage}: give a share from 0.98 to 1.0")
    if options.max_sentences < 1:
        raise ConfigError(f"--max-sentences {options.max_sentences}: give 1 or more")


def _explain(error: Exception, vocab_size: int) -> ConfigError:
    message = str(error)
    if largest := re.search(r"value <= (\d+)", message):
        return ConfigError(
            f"--vocab-size {vocab_size} is too large for this text; the largest possible is {largest[1]}: give that, "
            "more text, or --allow-smaller-vocab"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return ConfigError(f"--vocab-size {vocab_size} is too small; the characters of this text need {smallest[1]}")
    return ConfigError(f"SentencePiece cannot train --vocab-size {vocab_size}: {message.splitlines()[0]}")
