"""The order of the blocks of a run: a keyed permutation of each epoch, computed per index, without a table."""

import numpy as np
from numpy.typing import NDArray

from megatron_metro.data.randomness import Purpose, Words, draw_words_once

NUM_ROUND_WORDS = 12


def order_blocks(
    ordinals: NDArray[np.int64], num_blocks: int, seed: int, identity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(epoch, block) at places of the endless sequence of a data set: epoch after epoch, each a new permutation."""
    epochs, blocks = np.divmod(ordinals, num_blocks)
    for epoch in np.unique(epochs):
        rows = epochs == epoch
        words = draw_words_once(seed, identity, Purpose.ORDER, int(epoch), NUM_ROUND_WORDS)
        blocks[rows] = permute(blocks[rows], num_blocks, words)
    return epochs, blocks


def permute(indices: NDArray[np.int64], num_items: int, round_words: Words) -> NDArray[np.int64]:
    """Where each index goes in the permutation of 0..num_items-1 that 12 random words fix.

    A Feistel network on pairs (row, column) of the smallest near-square grid that holds n, its halves added modulo the
    sides; what lands outside 0..n-1 walks on until it is inside, which keeps it a permutation (cycle walking).
    """
    columns = int(np.ceil(np.sqrt(num_items)))
    rows = -(-num_items // columns)
    permuted = indices.astype(np.uint64)
    walking = np.arange(len(permuted))
    while len(walking):
        permuted[walking] = _walk(permuted[walking], np.uint64(rows), np.uint64(columns), round_words)
        walking = walking[permuted[walking] >= num_items]
    return permuted.astype(np.int64)


def _walk(values: Words, rows: np.uint64, columns: np.uint64, round_words: Words) -> Words:
    row, column = values // columns, values % columns
    for even, odd in zip(round_words[::2], round_words[1::2]):
        row = (row + _mix(column + even) % rows) % rows
        column = (column + _mix(row + odd) % columns) % columns
    return row * columns + column


def _mix(values: Words) -> Words:
    """The finaliser of SplitMix64: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
