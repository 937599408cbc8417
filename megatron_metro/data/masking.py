"""Which tokens are corrupted: pure functions of ids and random words, over a batch of blocks.

Letters: b blocks, s tokens of a block, g slots, n spans.
"""

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_metro.data.randomness import BlockKeys, Purpose, Words, choose, draw_words, to_integers, to_uniforms

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]
Array = TypeVar("Array", bound=NDArray[Any])


def round_counts(lengths: Ids, mask_prob: float, uniforms: NDArray[np.float64]) -> Ids:
    """[b]: floor(mask_prob * length + U), so that the mean is mask_prob * length (reference section 3.2).

    U = 0 everywhere rounds down instead.
    """
    return np.floor(mask_prob * lengths + uniforms).astype(np.int64)


def list_slots(mask: Mask, num_slots: int) -> tuple[Ids, Mask]:
    """([b, g] positions of the True entries ascending, [b, g] validity); an unused slot points at s."""
    num_blocks, sequence_length = mask.shape
    counts = mask.sum(axis=1)
    valid = np.arange(num_slots) < counts[:, None]
    slots = np.full((num_blocks, num_slots), sequence_length, dtype=np.int64)
    slots[valid] = np.nonzero(mask)[1]
    return slots, valid


def take_slots(values: Array, slots: Ids) -> Array:
    """[b, g] entries of [b, s] at slots; an unused slot reads the last column."""
    return np.take_along_axis(values, np.minimum(slots, values.shape[1] - 1), axis=1)  # type: ignore[return-value]


def draw_uniforms(keys: BlockKeys, sequence_length: int, slots: Ids, valid: Mask) -> NDArray[np.float64]:
    """[b, g] uniforms that pick the generator's tokens, 0 at unused slots.

    Keyed by position, so that the slot a position falls into is of no consequence.
    """
    return np.where(valid, to_uniforms(take_slots(draw_words(keys, Purpose.SAMPLE, sequence_length), slots)), 0.0)


def corrupt_tokens(
    token_ids: Ids, words: tuple[Words, Words], probs: tuple[float, float], mask_id: int, random_ids: range
) -> Ids:
    """What the generator sees in place of chosen tokens (any shape): the mask token, a random id or the token itself.

    `words` decide between the three and pick the random id; `probs` are of mask and random (reference: 0.8, 0.1).
    """
    mask_prob, random_prob = probs
    decision = to_uniforms(words[0])
    random = random_ids.start + to_integers(words[1], len(random_ids))
    corrupted = np.where(decision < mask_prob + random_prob, random, token_ids)
    return np.where(decision < mask_prob, mask_id, corrupted)


def split_randomly(words: Words, num_items: int, num_segments: int) -> Ids:
    """[b, n] lengths >= 1 that sum to `num_items`, every such split equally likely; `words` is [b, num_items - 1]."""
    num_blocks = len(words)
    counts = np.full(num_blocks, num_segments - 1, dtype=np.int64)
    bounds = np.zeros((num_blocks, num_segments + 1), dtype=np.int64)
    bounds[:, -1] = num_items
    if num_segments > 1:
        bounds[:, 1:-1] = np.nonzero(choose(words, counts))[1].reshape(num_blocks, -1) + 1
    return np.diff(bounds, axis=1)


def mark_spans(kept_lengths: Ids, noise_lengths: Ids) -> tuple[Mask, Mask]:
    """(noise, span start) [b, s]: kept and noise stretches in turn, beginning with a kept one (T5's random spans)."""
    num_blocks, num_spans = noise_lengths.shape
    ends = np.stack([kept_lengths, noise_lengths], axis=2).reshape(num_blocks, 2 * num_spans).cumsum(axis=1)
    starts = ends[:, ::2]
    sequence_length = int(ends[0, -1])
    steps = np.zeros((num_blocks, sequence_length + 1), dtype=np.int8)
    np.put_along_axis(steps, starts, 1, axis=1)
    is_start = steps[:, :-1] == 1
    np.put_along_axis(steps, ends[:, 1::2], -1, axis=1)
    noise = steps[:, :-1].cumsum(axis=1, dtype=np.int8).astype(np.bool_)
    return noise, is_start


def choose_spans(words: Words, counts: Ids, totals: Ids, mean_span: float) -> Mask:
    """[b, s]: `counts` of the first `totals` positions as contiguous spans of the mean length, none touching another.

    There are round(count / mean_span) spans, fewer where they would touch; every choice of lengths and places is
    equally likely. `words` is [b, 2 s + 1].
    """
    num_blocks, length = len(words), words.shape[1] // 2
    positions, kept = np.arange(length), totals - counts
    num_spans = np.minimum(np.maximum(np.rint(counts / mean_span).astype(np.int64), counts > 0), kept + 1)
    num_spans = np.minimum(num_spans, counts)
    ends = choose(words[:, :length], np.maximum(num_spans - 1, 0), positions < (counts - 1)[:, None])
    # A span stands before a kept token, or after the last.
    places = choose(words[:, length:], num_spans, np.arange(length + 1) <= kept[:, None])
    kept_before, _ = list_slots(places, max(int(num_spans.max()), 1))
    span = ends.cumsum(axis=1) - ends  # of the i-th masked token
    targets = positions + np.take_along_axis(kept_before, span, axis=1)
    mask = np.zeros((num_blocks, length + 1), dtype=np.bool_)
    np.put_along_axis(mask, np.where(positions < counts[:, None], targets, length), True, axis=1)
    return mask[:, :length]
