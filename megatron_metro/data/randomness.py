"""Random numbers that are a function of (seed, data set, epoch, block, purpose) and of nothing else.

Raw 64-bit words come from the counter-based generator Philox4x64-10; the mapping of words to uniforms, integers and
subsets is ours, because library mappings change between versions. Golden bytes: tests/unit/data/test_randomness.py.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
WORD_MASK = 2**64 - 1


class Purpose(IntEnum):
    """What words are drawn for; each purpose has its own stream. Numbers are part of the promise: never reuse one."""

    ORDER = 0  # order of the blocks of an epoch
    SHIFT = 1  # where the first block of an epoch starts
    CROP = 2  # which part of an overlong line is kept
    MASK = 3  # which positions METRO masks, and what the generator sees there
    SAMPLE = 4  # the uniforms that pick the generator's tokens
    SPANS = 5  # lengths of T5's spans
    NOISE = 6  # which tokens T5's survey objectives corrupt one by one, and random ids there
    SHUFFLE = 7  # order of the tokens of a shuffled text
    SPLIT = 8  # where a text is split into prefix and target
    METRO_SPANS = 9  # the METRO paper's own T5 spans
    MASK_SPANS = 10  # lengths and places of METRO's contiguous masks
    WRITING = 11  # the uniforms that pick the tokens of a generated text
    PACKING = 12  # which examples share a row


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockKeys:
    """What identifies each of b blocks for ever, whatever rank, worker or step it is drawn by."""

    seed: int
    identity: Words  # [b] of the data set
    epoch: NDArray[np.int64]  # [b]
    block: NDArray[np.int64]  # [b] number in the data set, before shuffling

    def __len__(self) -> int:
        return len(self.block)


def draw_words(keys: BlockKeys, purpose: Purpose, num_words: int) -> Words:
    """[b, num_words]: row i is Philox4x64-10 of key (seed, identity) and counters (1.., block, epoch, purpose)."""
    generator = np.random.Philox(key=0)
    # Writing the state takes a quarter of the time of building a generator per block.
    state = generator.state
    state["buffer_pos"] = 4  # nothing is buffered: the next word starts a new counter
    counter, key = state["state"]["counter"], state["state"]["key"]
    words = np.empty((len(keys), num_words), dtype=np.uint64)
    key[0] = keys.seed & WORD_MASK
    counter[0], counter[3] = 0, purpose
    for row, (identity, epoch, block) in enumerate(zip(keys.identity, keys.epoch, keys.block)):
        key[1], counter[1], counter[2] = identity, block, epoch
        generator.state = state
        words[row] = generator.random_raw(num_words)
    return words


def draw_words_once(seed: int, identity: int, purpose: Purpose, epoch: int, num_words: int) -> Words:
    """[num_words] that belong to a whole epoch of a data set."""
    keys = BlockKeys(
        seed=seed,
        identity=np.array([identity], dtype=np.uint64),
        epoch=np.array([epoch], dtype=np.int64),
        block=np.zeros(1, dtype=np.int64),
    )
    return draw_words(keys, purpose, num_words)[0]


def to_uniforms(words: Words) -> NDArray[np.float64]:
    """The upper 53 bits of each word as a multiple of 2^-53 in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def to_integers(words: Words, bound: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """The upper 32 bits scaled to [0, bound), bound < 2^32.

    Multiply and shift: probabilities differ from 1 / bound by less than 2^-32, which no experiment here can see.
    """
    scaled = (words >> np.uint64(32)) * np.asarray(bound, dtype=np.uint64)
    return (scaled >> np.uint64(32)).astype(np.int64)


def choose(words: Words, counts: NDArray[np.int64], candidates: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """[b, n]: in row i the `counts[i]` candidates with the smallest words, a draw without replacement.

    A word's lowest bits give way to its position, so that ties go to the lower position. Counts beyond the number of
    candidates are not allowed.
    """
    num_items = words.shape[1]
    position_bits = np.uint64(max(num_items - 1, 1).bit_length())
    positions = np.arange(num_items, dtype=np.uint64)
    # The top bit is free for those that must never be chosen.
    ranked = (words >> (position_bits + np.uint64(1)) << position_bits) | positions
    if candidates is not None:
        ranked |= (~candidates).astype(np.uint64) << np.uint64(63)
    ordered = np.sort(ranked, axis=1)
    last = np.take_along_axis(ordered, np.maximum(counts - 1, 0)[:, None], axis=1)
    return (ranked <= last) & (counts > 0)[:, None]
