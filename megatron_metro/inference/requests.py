"""Requests as JSON lines: what a line may say, and what is answered.

A line is an object with "source", a text or a list of ids that are taken as they are, and to be scored "choices", a
list of such targets, or "target", a single one. The answer is the same object with more keys: "output" (text, or ids
where the source is ids), "score" and "has_ended"; or "log_probs", one per choice. Other keys pass through.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_metro.config.errors import DataError
from megatron_metro.inference.pipeline import Written
from megatron_metro.tokenizer import Tokenizer

Mode = Literal["write", "score"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One line, as ids that end with </s>."""

    number: int  # of the line, from 0
    record: dict[str, Any]
    source: list[int]
    choices: list[list[int]]  # empty where a text is to be written


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """Lines to requests. `max_length` is the longest side that the model has positions for."""

    tokenizer: Tokenizer
    mode: Mode
    max_length: int | None

    def read(self, lines: Iterable[str], name: str) -> list[Request]:
        """All requests of a file; raises DataError naming the first line that is none."""
        return [self.read_line(line, number, f"{name}:{number + 1}") for number, line in enumerate(lines)]

    def read_line(self, line: str, number: int, place: str) -> Request:
        """One request; raises DataError."""
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: is not JSON ({error}); give an object per line") from error
        if not isinstance(record, dict) or "source" not in record:
            raise DataError(f'{place}: has no "source"; give an object with that key')
        choices = []
        if self.mode == "score":
            targets = record.get("choices", [record["target"]] if "target" in record else None)
            if not isinstance(targets, list) or not targets:
                raise DataError(f'{place}: has neither "choices", a list, nor "target"; give what is to be scored')
            choices = [self._encode(target, f"{place}: a target", is_source=False) for target in targets]
        source = self._encode(record["source"], f"{place}: the source", is_source=True)
        return Request(number=number, record=record, source=source, choices=choices)

    def _encode(self, side: Any, name: str, *, is_source: bool) -> list[int]:
        vocabulary = self.tokenizer.vocabulary
        if isinstance(side, str):
            ids = vocabulary.frame(self.tokenizer.encode(side), is_source=is_source)
        elif isinstance(side, list) and side and all(type(i) is int and 0 <= i < vocabulary.vocab_size for i in side):
            ids = side
        else:
            raise DataError(f"{name} is neither text nor a list of ids below {vocabulary.vocab_size}; give one of them")
        if self.max_length is not None and len(ids) > self.max_length:
            raise DataError(f"{name} has {len(ids)} tokens, the model has {self.max_length} positions; shorten it")
        return ids


def answer_written(request: Request, written: Written, tokenizer: Tokenizer) -> str:
    """The line of a text that was written."""
    is_text = isinstance(request.record["source"], str)
    output = tokenizer.decode(written.ids) if is_text else list(written.ids)
    return _format(request, {"output": output, "score": written.score, "has_ended": written.has_ended})


def answer_scored(request: Request, log_probs: Sequence[float]) -> str:
    """The line of targets that were scored."""
    return _format(request, {"log_probs": list(log_probs)})


def _format(request: Request, answer: dict[str, Any]) -> str:
    return json.dumps({**request.record, **answer}, ensure_ascii=False) + "\n"
