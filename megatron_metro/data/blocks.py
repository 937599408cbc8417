"""Tokens of packed blocks and what identifies each block: what packing hands to objectives."""

from collections.abc import Callable
from dataclasses import dataclass

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


def map_rows(blocks: Blocks, make_rows: Callable[[Blocks], tuple[NDArray, ...]]) -> list[Tensor]:
    """`make_rows` on a cacheful of rows at a time, its arrays joined again and handed over as tensors."""
    parts = [make_rows(blocks.rows(row, row + ROWS_PER_CHUNK)) for row in range(0, len(blocks), ROWS_PER_CHUNK)]
    return [torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts)]
