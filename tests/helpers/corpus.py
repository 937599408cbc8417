"""A small text, its tokenizer and its token files, and configurations that read them."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from megatron_metro.config.schema import DataConfig, ObjectiveConfig, RunConfig, TrainingConfig
from megatron_metro.data.preprocess import PreprocessOptions, PreprocessReport, preprocess
from megatron_metro.data.vocabulary_training import VocabularyOptions, train_vocabulary, write_vocabulary
from megatron_metro.tokenizer import Tokenizer

NUM_DOCUMENTS = 120
NUM_SENTINELS = 64


def ignore_progress(report: PreprocessReport) -> None:
    """For calls that show nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Where the text is, what it says and what reads it."""

    folder: Path
    jsonl: Path
    texts: list[str]
    model: Path
    tokenizer: Tokenizer
    prefix: str  # full documents
    lines_prefix: str  # a sequence per line


def build_corpus(folder: Path) -> Corpus:
    """Write text, train a tokenizer on it and preprocess it, as documents and as lines."""
    generator = random.Random(7)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 7))) for _ in range(300)]
    texts = [
        "\n".join(
            " ".join(generator.choices(words, k=generator.randint(1, 40))) for _ in range(generator.randint(1, 12))
        )
        for _ in range(NUM_DOCUMENTS)
    ]
    jsonl = folder / "text.jsonl"
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = train_vocabulary(VocabularyOptions(inputs=(str(jsonl),), vocab_size=200))
    path, _ = write_vocabulary(model, str(folder / "tokenizer"))
    tokenizer = Tokenizer.load(path, NUM_SENTINELS)
    for split_lines in (False, True):
        options = PreprocessOptions(inputs=(str(jsonl),), output_prefix=str(folder / "train"), split_lines=split_lines)
        preprocess(options, tokenizer, ignore_progress)
    return Corpus(
        folder=folder,
        jsonl=jsonl,
        texts=texts,
        model=path,
        tokenizer=tokenizer,
        prefix=str(folder / "train_text_document"),
        lines_prefix=str(folder / "train_text_sentence"),
    )


def make_config(
    *prefixes: str,
    sequence_length: int = 32,
    micro_batch_size: int = 4,
    split: str = "80,20,0",
    objective: str = "metro",
    block_mode: str = "full",
    num_workers: int = 0,
    cache_path: str | None = None,
) -> RunConfig:
    """A run that reads these data sets."""
    return RunConfig(
        data=DataConfig(
            data_path=prefixes,
            encoder_seq_length=sequence_length,
            split=split,
            block_mode=block_mode,  # type: ignore[arg-type]
            num_workers=num_workers,
            data_cache_path=cache_path,
        ),
        objective=ObjectiveConfig(objective=objective),  # type: ignore[arg-type]
        training=TrainingConfig(micro_batch_size=micro_batch_size),
    )
