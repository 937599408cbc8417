"""The name table of a format: each weight of ours, the tensors it is made of there, and how.

A transform joins the parts of a format into our weight and splits our weight into them; splitting undoes joining to the
bit. Both only place numbers, so shapes can be had by splitting an empty tensor of device "meta".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Transform(Protocol):
    """Between one weight of ours and its parts in a format."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Our weight, in new memory or that of the only part."""

    def split(self, weight: Tensor) -> list[Tensor]:
        """Its parts, contiguous."""


@dataclass(frozen=True, slots=True)
class Same:
    """One part, which is the weight."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """[...] to [...]."""
        (part,) = parts
        return part

    def split(self, weight: Tensor) -> list[Tensor]:
        """[...] to [...]."""
        return [weight]


@dataclass(frozen=True, slots=True)
class Heads:
    """Projections of equal size, which a fused projection of ours holds head by head: queries, keys, values; queries...

    Weights [heads * head size, h] and biases [heads * head size].
    """

    num_parts: int
    head_size: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """num_parts of [p, ...] to [num_parts * p, ...]."""
        assert len(parts) == self.num_parts
        return torch.stack([part.unflatten(0, (-1, self.head_size)) for part in parts], dim=1).flatten(0, 2)

    def split(self, weight: Tensor) -> list[Tensor]:
        """[num_parts * p, ...] to num_parts of [p, ...]."""
        by_head = weight.unflatten(0, (-1, self.num_parts, self.head_size))
        return [part.flatten(0, 1).contiguous() for part in by_head.unbind(1)]


@dataclass(frozen=True, slots=True)
class Rows:
    """Matrices of equal size one above the other: a gated layer's gates, then its values."""

    num_parts: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """num_parts of [f, ...] to [num_parts * f, ...]."""
        assert len(parts) == self.num_parts
        return torch.cat(list(parts))

    def split(self, weight: Tensor) -> list[Tensor]:
        """[num_parts * f, ...] to num_parts of [f, ...]."""
        return [part.contiguous() for part in weight.chunk(self.num_parts)]


@dataclass(frozen=True, slots=True)
class BelowZeros:
    """A table that begins `num_rows` rows later than ours, where ours has rows that no token reads."""

    num_rows: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """[n, h] to [num_rows + n, h]."""
        (part,) = parts
        return torch.cat([part.new_zeros(self.num_rows, *part.shape[1:]), part])

    def split(self, weight: Tensor) -> list[Tensor]:
        """[num_rows + n, h] to [n, h]."""
        return [weight[self.num_rows :]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One weight of ours and what it is in a format."""

    ours: str
    theirs: tuple[str, ...]  # names of the parts, in the order of the transform
    transform: Transform = Same()
    copies: tuple[str, ...] = ()  # further names that files may give the only part; all that are there must be equal

    def list_parts(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parts of a weight of this shape, without copies."""
        parts = self.transform.split(torch.empty(shape, device="meta"))
        return {name: tuple(part.shape) for name, part in zip(self.theirs, parts, strict=True)}


def copies(table: dict[str, str]) -> list[Rule]:
    """Rules for weights that only have another name: ours to theirs."""
    return [Rule(ours=ours, theirs=(theirs,)) for ours, theirs in table.items()]
