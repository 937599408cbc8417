"""Tasks of five kinds as sources and targets, from public data sets that are no part of the repository.

The folder that holds them is named by METRO_TASK_DATA: gzipped JSON lines with the fields of the Hugging Face versions.
"""

import gzip
import json
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

Pair = tuple[str, str]
Record = dict[str, Any]

FOLDER_VARIABLE = "METRO_TASK_DATA"
SENTIMENT = ("negative", "positive")
ENTAILMENT = ("entailment", "not_entailment")


def _classify(record: Record) -> Pair:
    return f"sst2 sentence: {record['sentence'].strip()}", SENTIMENT[record["label"]]


def _infer(record: Record) -> Pair:
    return f"rte premise: {record['premise']} hypothesis: {record['hypothesis']}", ENTAILMENT[record["label"]]


def _answer(record: Record) -> Pair:
    return f"question: {record['question']} context: {record['context']}", record["answers"]["text"][0]


def _summarise(record: Record) -> Pair:
    return f"summarize: {record['document']}", record["summary"]


def _translate(record: Record) -> Pair:
    return f"translate English to German: {record['translation']['en']}", record["translation"]["de"]


# A file of each kind, and what a record becomes; the prompts are T5's.
KINDS: dict[str, tuple[str, Callable[[Record], Pair]]] = {
    "classification": ("glue/sst2_train_sentences", _classify),
    "inference": ("super_glue/rte_train", _infer),
    "question answering": ("squad/train_slice", _answer),
    "summarisation": ("xsum/test_sample_part1", _summarise),
    "translation": ("multi30k/en-de_train10k", _translate),
}
SENTIMENT_HELD_OUT = "glue/sst2_validation"


def read_records(name: str) -> Iterator[Record]:
    """The records of a file; the test is skipped where it is absent."""
    folder = os.environ.get(FOLDER_VARIABLE)
    path = Path(folder or ".") / f"{name}.jsonl.gz"
    if folder is None or not path.is_file():
        pytest.skip(f"{name}.jsonl.gz is not there; name its folder with {FOLDER_VARIABLE}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def read_pairs(name: str, make: Callable[[Record], Pair], count: int | None = None) -> list[Pair]:
    """The first `count` examples of a file that have both sides, each text on one line."""
    pairs = (make(record) for record in read_records(name))
    tidy = ((" ".join(source.split()), " ".join(target.split())) for source, target in pairs)
    return list(islice((pair for pair in tidy if all(pair) and not pair[0].endswith(":")), count))


def write_pairs(path: Path, pairs: Sequence[Pair]) -> Path:
    """As the JSON lines of fine-tuning."""
    lines = (json.dumps({"source": source, "target": target}, ensure_ascii=False) for source, target in pairs)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path
