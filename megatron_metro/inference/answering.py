"""Answer the requests of a file, or one after the other at a terminal; every rank calls the same functions."""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from megatron_metro.config.errors import DataError
from megatron_metro.config.schema import RunConfig
from megatron_metro.inference.answers import AnswerFile
from megatron_metro.inference.options import WritingIds, WritingOptions
from megatron_metro.inference.pipeline import EncoderDecoder, pad_sources
from megatron_metro.inference.requests import Reader, Request, answer_scored, answer_written
from megatron_metro.inference.scoring import score_choices
from megatron_metro.inference.writing import write
from megatron_metro.parallel.agreement import on_first_rank
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """A model with all that answering takes. The model is opened when it is first asked for, by all ranks together."""

    open_model: Callable[[], EncoderDecoder]
    groups: ParallelGroups
    tokenizer: Tokenizer
    ids: WritingIds
    options: WritingOptions
    reader: Reader

    @cached_property
    def model(self) -> EncoderDecoder:
        """Opened once."""
        return self.open_model()

    def answer(self, requests: Sequence[Request]) -> list[str]:
        """A line for each request of a batch."""
        sources = pad_sources([request.source for request in requests], self.ids.pad, self.model.device)
        if self.reader.mode == "score":
            scores = score_choices(self.model, sources, [request.choices for request in requests], self.ids)
            return [answer_scored(request, log_probs) for request, log_probs in zip(requests, scores)]
        numbers = [request.number for request in requests]
        texts = write(self.model, sources, self.ids, self.options, numbers)
        return [answer_written(request, text, self.tokenizer) for request, text in zip(requests, texts)]


def describe_job(run: RunConfig, source: Path, answerer: Answerer) -> dict[str, Any]:
    """What answers are a function of; neither layout nor batch size is part of it."""
    return {
        "input": hashlib.sha256(source.read_bytes()).hexdigest(),
        "load": [run.checkpoint.load, run.checkpoint.ckpt_step, run.optimizer.bf16],
        "tokenizer": answerer.tokenizer.sha256,
        "mode": answerer.reader.mode,
        "ids": asdict(answerer.ids),
        "options": asdict(answerer.options),
    }


def answer_file(answerer: Answerer, run: RunConfig, source: Path, output: Path, batch_size: int) -> int:
    """Answer every line of `source` in `output`, from where an earlier attempt stopped; returns their number.

    All lines are read before the model is opened. Raises DataError, ConfigError or StorageError on every rank.
    """
    requests = on_first_rank(lambda: answerer.reader.read(_read_lines(source), str(source)))
    answers = AnswerFile(output, on_first_rank(lambda: describe_job(run, source, answerer)))
    num_done = on_first_rank(answers.resume)
    is_first = answerer.groups.rank == 0
    with tqdm(
        total=len(requests), initial=num_done, unit="request", file=sys.stderr, disable=None if is_first else True
    ) as bar:
        for start in range(num_done, len(requests), batch_size):
            lines = answerer.answer(requests[start : start + batch_size])
            on_first_rank(partial(answers.append, lines))
            bar.update(len(lines))
    on_first_rank(answers.publish)
    return len(requests)


def converse(answerer: Answerer, source: TextIO, output: TextIO) -> None:
    """Answer line after line, each when it comes: a request, or a plain text that is a source."""
    number, _ = 0, answerer.model
    while line := on_first_rank(source.readline):
        if not line.strip():
            continue
        try:
            request = answerer.reader.read_line(_as_request(line), number, "this line")
        except DataError as error:
            lines = [f"error: {error}\n"]
        else:
            lines = answerer.answer([request])
        if answerer.groups.rank == 0:
            output.writelines(lines)
            output.flush()
        number += 1


def _as_request(line: str) -> str:
    return line if line.lstrip().startswith("{") else json.dumps({"source": line.strip()})


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--input {path}: cannot be read ({error}); give a file of JSON lines") from error
    return text.removesuffix("\n").split("\n") if text else []  # other line breaks may stand inside of JSON texts
