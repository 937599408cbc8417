"""Tokens of packed blocks, what identifies each block, and who gives them: what data sets hand to objectives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_metro.data.randomness import BlockKeys

# Rows handled at once: the words of 64 METRO rows of 512 tokens are 1 MiB and stay in the second-level cache.
ROWS_PER_CHUNK = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Tokens of b blocks as packed, with what identifies each block."""

    tokens: NDArray[np.int64]  # [b, raw_length], pad after a block's end
    lengths: NDArray[np.int64]  # [b]
    keys: BlockKeys

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, start: int, stop: int) -> "Blocks":
        """Some of the rows."""
        span = slice(start, stop)
        keys = BlockKeys(
            seed=self.keys.seed,
            identity=self.keys.identity[span],
            epoch=self.keys.epoch[span],
            block=self.keys.block[span],
        )
        return Blocks(tokens=self.tokens[span], lengths=self.lengths[span], keys=keys)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOrigin:
    """Which text a data set is."""

    path: str  # a file, or the prefix of several
    sha256: str  # hexadecimal, of the text
    documents: tuple[int, int]  # [start, stop) of it: what one split sees


class Source(Protocol):
    """An endless, shuffled sequence of the blocks of one data set."""

    @property
    def origin(self) -> TextOrigin:
        """What it reads."""

    @property
    def num_blocks(self) -> int:
        """Blocks of one epoch."""

    @property
    def size(self) -> int:
        """What it counts in a blend without weights."""

    def describe(self) -> str:
        """How much there is, for people."""

    def verify(self, tokenizer_sha256: str) -> None:
        """Check every byte; DataError names what is wrong."""

    def read(self, ordinals: NDArray[np.int64]) -> Blocks:
        """The blocks at these places of the sequence."""


def map_rows(blocks: Blocks, make_rows: Callable[[Blocks], tuple[NDArray, ...]]) -> list[Tensor]:
    """`make_rows` on a cacheful of rows at a time, its arrays joined again and handed over as tensors."""
    parts = [make_rows(blocks.rows(row, row + ROWS_PER_CHUNK)) for row in range(0, len(blocks), ROWS_PER_CHUNK)]
    return [torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts)]
