"""Keys and values that a decoder keeps from token to token while it writes.

megatron-core's own inference context does not serve here. It keeps the keys of self-attention alone: handed to a
cross-attention it would write the encoder's keys into the buffer of the same layer number, and without it they are
projected again for every token. It also reserves the longest sequence for the largest batch, and copies all of that
whenever beams change places. So both kinds are kept here, as plain tensors [positions, rows, local heads, head size],
and enter core's attention modules where these ask for the states to attend to.

Letters: t new positions, r rows (sequences being written), n local heads, d head size, s encoder positions, b sources.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

_FIRST_CAPACITY = 32  # positions; doubled when they are full


class OwnPast:
    """Keys and values of a self-attention at all positions written so far."""

    def __init__(self) -> None:
        self.length = 0
        self._buffer: Tensor | None = None  # [2, capacity, r, n, d]

    def append(self, key_TRND: Tensor, value_TRND: Tensor) -> tuple[Tensor, Tensor]:
        """Those of new positions; returns those of all positions (views that the next call may overwrite)."""
        start, end = self.length, self.length + key_TRND.shape[0]
        if self._buffer is None or end > self._buffer.shape[1]:
            capacity = _FIRST_CAPACITY if self._buffer is None else 2 * self._buffer.shape[1]
            grown = key_TRND.new_empty((2, max(capacity, end), *key_TRND.shape[1:]))
            if self._buffer is not None:
                grown[:, :start] = self._buffer[:, :start]
            self._buffer = grown
        self._buffer[0, start:end] = key_TRND
        self._buffer[1, start:end] = value_TRND
        self.length = end
        return self._buffer[0, :end], self._buffer[1, :end]

    def take(self, rows_R: Tensor) -> None:
        """Go on with these rows, each of which may be taken several times or not at all; as many as before."""
        if self._buffer is not None:
            self._buffer[:, : self.length] = self._buffer[:, : self.length].index_select(2, rows_R)


@dataclass(frozen=True, slots=True)
class SourcePast:
    """Keys and values of a cross-attention, made from the encoder's output once."""

    key: Tensor  # [s, b, n, d]
    value: Tensor  # [s, b, n, d]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPast:
    """What one decoder layer keeps."""

    source: SourcePast
    own: OwnPast = field(default_factory=OwnPast)


@dataclass(kw_only=True, slots=True)
class WritingState:
    """What a piece of the chain keeps between two tokens of a batch of rows, r / b of them for each source."""

    source_mask: Tensor | None  # bool [b, 1, 1, s], True at padding
    layers: dict[int, LayerPast]
    length: int = 0  # tokens read so far, the start token included

    def take(self, rows_R: Tensor) -> None:
        """Go on with these rows in place of the present ones; each must be of the source of the one it replaces."""
        if not torch.equal(rows_R, torch.arange(len(rows_R), device=rows_R.device)):
            for layer in self.layers.values():
                layer.own.take(rows_R)
