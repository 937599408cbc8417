"""Weights under our names, wherever they lie: in one of our steps, or in a format through its name table.

One weight at a time is in memory. Names and shapes are compared with the configuration before any number is read, and
numbers that are not finite are refused as they are read.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_metro.config.errors import CheckpointError
from megatron_metro.config.schema import ModelConfig, RunConfig
from megatron_metro.conversion.mapping import Rule
from megatron_metro.model.weights import weight_shapes
from megatron_metro.tokenizer import SentencePieceTokenizer

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_BLOCK = 1 << 24  # numbers judged at once


class TensorFile(Protocol):
    """Tensors by name, in files of any kind; those of a step too."""

    def names(self) -> Sequence[str]:
        """All of them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of `names`."""

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""

    def read(self, name: str) -> Tensor:
        """In new memory, contiguous, on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A model to convert: the run it stands for and its weights under our names."""

    run: RunConfig
    weights: TensorFile
    place: Path  # what messages name
    tokenizer: SentencePieceTokenizer | None


class MappedWeights:
    """Weights of a format under our names.

    Raises CheckpointError where tensors are missing, left over or of another shape than `model` says. `ignored` are
    names that the format may hold and that mean nothing.
    """

    def __init__(
        self, tensors: TensorFile, rules: Sequence[Rule], model: ModelConfig, place: Path, ignored: Collection[str] = ()
    ) -> None:
        self._tensors, self._place = tensors, place
        self._found = frozenset(tensors.names())
        self._rules = {rule.ours: rule for rule in rules}
        self._shapes = weight_shapes(model)
        if different := self._rules.keys() ^ self._shapes.keys():
            raise CheckpointError(f"{place}: its format has no place for {min(different)}, or this model has not")
        self._check_names(ignored)
        for rule in rules:
            for name, shape in rule.list_parts(self._shapes[rule.ours]).items():
                for found in self._list_copies(rule) or [name]:
                    self._check_tensor(found, shape, self.dtype(rule.ours))

    def names(self) -> tuple[str, ...]:
        """All weights of the model."""
        return tuple(self._rules)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._tensors.dtype(self._list_parts(name)[0])

    def read(self, name: str) -> Tensor:
        """A weight; all copies of it are compared. Raises CheckpointError."""
        rule = self._rules[name]
        parts = [self._tensors.read(part) for part in self._list_parts(name)]
        for other in self._list_copies(rule)[1:]:
            if not have_same_bits(parts[0], self._tensors.read(other)):
                raise CheckpointError(
                    f"{self._place}: {other} is not {rule.theirs[0]}, to which its configuration ties it; give the "
                    "configuration it was saved with"
                )
        weight = rule.transform.join(parts)
        check_finite(weight, name, self._place)
        return weight

    def _list_parts(self, name: str) -> Sequence[str]:
        rule = self._rules[name]
        return self._list_copies(rule)[:1] or rule.theirs

    def _list_copies(self, rule: Rule) -> list[str]:
        """The names under which the only part of a rule is there, if it may have several."""
        return [name for name in (*rule.theirs, *rule.copies) if name in self._found] if rule.copies else []

    def _check_names(self, ignored: Collection[str]) -> None:
        known = set(ignored)
        for rule in self._rules.values():
            known.update(rule.theirs, rule.copies)
            missing = [] if self._list_copies(rule) else [part for part in rule.theirs if part not in self._found]
            if missing:
                raise CheckpointError(
                    f"{self._place}: lacks {missing[0]}, which its configuration asks for; give the whole model"
                )
        if extra := sorted(self._found - known):
            raise CheckpointError(
                f"{self._place}: holds {extra[0]} ({len(extra)} such tensors), which its configuration has no place "
                "for; give a model of this format"
            )

    def _check_tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if self._tensors.shape(name) != shape:
            raise CheckpointError(
                f"{self._place}: {name} has shape {list(self._tensors.shape(name))}, its configuration says "
                f"{list(shape)}; give the configuration it was saved with"
            )
        if dtype not in FLOATS or self._tensors.dtype(name) != dtype:
            raise CheckpointError(
                f"{self._place}: {name} is of {self._tensors.dtype(name)}; give weights as floats of one kind"
            )


class SplitWeights:
    """The other way: weights of ours as the tensors of a format, without copies."""

    def __init__(self, source: TensorFile, rules: Sequence[Rule]) -> None:
        self._source, self._rules = source, list(rules)

    def list_shapes(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each tensor, in the order in which `__iter__` gives them."""
        return {
            name: (shape, self._source.dtype(rule.ours))
            for rule in self._rules
            for name, shape in rule.list_parts(self._source.shape(rule.ours)).items()
        }

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for rule in self._rules:
            yield from zip(rule.theirs, rule.transform.split(self._source.read(rule.ours)), strict=True)


def compare_weights(written: TensorFile, source: TensorFile, place: Path) -> None:
    """Raise CheckpointError unless what was written, read again, is the source's weights to the bit."""
    names = source.names()
    if set(written.names()) != set(names):
        raise CheckpointError(f"{place}: does not hold the weights that were written; try another disk")
    for name in names:
        if not have_same_bits(written.read(name), source.read(name)):
            raise CheckpointError(f"{place}: {name} is not what was written; try another disk")


def have_same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two contiguous tensors have the same type, shape and bytes, signs of zeros included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def check_finite(weight: Tensor, name: str, place: Path) -> None:
    """Raise CheckpointError where a weight holds NaN or infinity."""
    for block in weight.reshape(-1).split(_BLOCK):
        if not bool(block.isfinite().all()):
            raise CheckpointError(f"{place}: {name} holds numbers that are not finite; give another checkpoint")
