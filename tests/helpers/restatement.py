"""The objectives written down again: one block at a time, plain lists, from the papers' definitions.

Nothing here imports objectives, masks or lengths of the library; only the random words of a block are its own, for
these are no part of a definition. A side is a list without padding.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from megatron_metro.data.randomness import BlockKeys, Purpose, draw_words


@dataclass(frozen=True, kw_only=True)
class Ids:
    """A vocabulary's ids, named by hand."""

    eos: int
    start: int
    mask: int
    sentinels: list[int]  # that mark spans, in order
    random: range
    is_t5: bool


METRO_IDS = Ids(eos=2, start=1000, mask=1000, sentinels=list(range(1001, 1400)), random=range(4, 1400), is_t5=False)
T5_IDS = Ids(eos=1, start=0, mask=1000, sentinels=list(range(1399, 999, -1)), random=range(3, 1400), is_t5=True)


def words_of(keys: BlockKeys, row: int, purpose: Purpose, count: int) -> list[int]:
    one = BlockKeys(
        seed=keys.seed,
        identity=keys.identity[row : row + 1],
        epoch=keys.epoch[row : row + 1],
        block=keys.block[row : row + 1],
    )
    return [int(word) for word in draw_words(one, purpose, count)[0]]


def uniform(word: int) -> float:
    return (word >> 11) / 2**53


def integer(word: int, bound: int) -> int:
    return ((word >> 32) * bound) >> 32


def pick(words: list[int], count: int, allowed: list[int]) -> list[int]:
    """A draw without replacement: those of the `allowed` places with the smallest words, in order."""
    return sorted(sorted(allowed, key=lambda place: words[place])[:count])


def noise_count(length: int, rate: float) -> int:
    return min(max(round(length * rate), 1), length - 1)


def lengths_of(words: list[int], total: int, parts: int) -> list[int]:
    """`total` as a sum of `parts` positive numbers: cut a row of tokens at `parts` - 1 of its gaps."""
    cuts = pick(words, parts - 1, list(range(total - 1)))
    edges = [0, *(cut + 1 for cut in cuts), total]
    return [after - before for before, after in pairwise(edges)]


# T5 (Raffel et al., 2020)


def t5_span(tokens: list[int], keys: BlockKeys, row: int, rate: float, mean: float, ids: Ids):
    """Kept and corrupted stretches in turn; each corrupted one is a sentinel in the input, and is listed behind it."""
    noise = noise_count(len(tokens), rate)
    spans, kept = max(round(noise / mean), 1), len(tokens) - noise
    words = words_of(keys, row, Purpose.SPANS, kept - 1 + noise - 1)
    source, target, place = [], [], 0
    stretches = zip(lengths_of(words[: kept - 1], kept, spans), lengths_of(words[kept - 1 :], noise, spans))
    for number, (before, corrupted) in enumerate(stretches):
        source += [*tokens[place : place + before], ids.sentinels[number]]
        place += before
        target += [ids.sentinels[number], *tokens[place : place + corrupted]]
        place += corrupted
    return [*source, ids.eos], [*target, ids.eos]


def noise_places(tokens: list[int], keys: BlockKeys, row: int, rate: float) -> set[int]:
    words = words_of(keys, row, Purpose.NOISE, len(tokens))
    return set(pick(words, noise_count(len(tokens), rate), list(range(len(tokens)))))


def t5_iid(tokens: list[int], keys: BlockKeys, row: int, rate: float, ids: Ids):
    """Figure 2: consecutive corrupted tokens share a sentinel; a final sentinel ends the target."""
    noise, source, target, number = noise_places(tokens, keys, row, rate), [], [], 0
    for place, token in enumerate(tokens):
        if place not in noise:
            source.append(token)
            continue
        if place - 1 not in noise:
            source.append(ids.sentinels[number])
            target.append(ids.sentinels[number])
            number += 1
        target.append(token)
    return [*source, ids.eos], [*target, ids.sentinels[number], ids.eos]


def drop_tokens(tokens: list[int], keys: BlockKeys, row: int, rate: float, ids: Ids):
    noise = noise_places(tokens, keys, row, rate)
    source = [token for place, token in enumerate(tokens) if place not in noise]
    return [*source, ids.eos], [*(tokens[place] for place in sorted(noise)), ids.eos]


def masked_text(tokens: list[int], keys: BlockKeys, row: int, rate: float, random_share: float, ids: Ids):
    """BERT-style with a share of random tokens, MASS-style without; the target is the text."""
    count = len(tokens)
    noise = noise_places(tokens, keys, row, rate)
    words, source = words_of(keys, row, Purpose.NOISE, 3 * count), list(tokens)
    for place in noise:
        is_mask = uniform(words[count + place]) < 1 - random_share
        source[place] = ids.mask if is_mask else ids.random[integer(words[2 * count + place], len(ids.random))]
    return [*source, ids.eos], [*tokens, ids.eos]


def prefix_lm(tokens: list[int], keys: BlockKeys, row: int, ids: Ids):
    split = 1 + integer(words_of(keys, row, Purpose.SPLIT, 1)[0], len(tokens) - 1)
    return [*tokens[:split], ids.eos], [*tokens[split:], ids.eos]


def deshuffle(tokens: list[int], keys: BlockKeys, row: int, ids: Ids):
    words = words_of(keys, row, Purpose.SHUFFLE, len(tokens))
    order = sorted(range(len(tokens)), key=lambda place: words[place])
    return [*(tokens[place] for place in order), ids.eos], [*tokens, ids.eos]


# The METRO paper's T5 baseline (reference section 3.5)


def metro_spans(tokens: list[int], width: int, starts_most: int, keys: BlockKeys, row: int, rate: float, ids: Ids):
    """Spans of nominal length 1 to 5 that may overlap; spans without tokens for what the budget lacks."""
    count = len(tokens)
    words = words_of(keys, row, Purpose.METRO_SPANS, 2 * width + 4 * starts_most + 6)
    rounding = [uniform(word) for word in words[-6:]]
    starts = pick(words, math.floor(rate * 0.9 * count / 3 + rounding[0]), list(range(count)))
    noise, alive = set(starts), list(range(len(starts)))
    for grown in range(1, 5):
        growth = words[2 * width + (grown - 1) * starts_most :]
        alive = pick(growth, math.floor(len(alive) * (1 - 1 / (6 - grown)) + rounding[grown]), alive)
        noise |= {(starts[span] + grown) % count for span in alive}
    lonely = [p for p in range(count) if not noise & {p - 1, p, p + 1}]
    budget = min(max(math.floor(rate * count - len(noise) + rounding[5]), 0), math.floor(rate * 0.1 * count + 1))
    empty = pick(words[width:], min(budget, len(lonely)), lonely)
    source, target, number = [], [], 0
    for place, token in enumerate(tokens):
        if place in empty or (place in noise and place - 1 not in noise):
            source.append(ids.sentinels[number])
            target.append(ids.sentinels[number])
            number += 1
        (target if place in noise else source).append(token)
    return source[:width], [*target, ids.eos if ids.is_t5 else ids.start]


# METRO and ELECTRA (reference sections 3.2 and 3.3), and SPACTOR


def metro_masks(
    tokens: list[int], width: int, keys: BlockKeys, row: int, rate: float, ids: Ids, mean=None, allowed=None
):
    """(masked places, what the generator reads): single tokens, or spans of a mean length among the allowed places."""
    words = words_of(keys, row, Purpose.MASK, 3 * width + 1)
    allowed = list(range(len(tokens))) if allowed is None else allowed
    count = min(math.floor(rate * len(tokens) + uniform(words[-1])), len(allowed))
    places = pick(words, count, allowed) if mean is None else span_places(width, keys, row, count, mean, allowed)
    seen = list(tokens)
    for place in places:
        decision = uniform(words[width + place])
        if decision < 0.8:
            seen[place] = ids.mask
        elif decision < 0.8 + 0.1:
            seen[place] = ids.random[integer(words[2 * width + place], len(ids.random))]
    return places, seen


def span_places(width: int, keys: BlockKeys, row: int, count: int, mean: float, allowed: list[int]) -> list[int]:
    """Spans stand before kept tokens or after the last; walk over kept tokens and put the spans where they stand."""
    if not count:
        return []
    words, kept = words_of(keys, row, Purpose.MASK_SPANS, 2 * width + 1), len(allowed) - count
    number = min(max(round(count / mean), 1), kept + 1, count)
    lengths = lengths_of(words[:width], count, number)
    before, places, place = pick(words[width:], number, list(range(kept + 1))), [], 0
    for token in range(kept + 1):
        if token in before:
            length = lengths.pop(0)
            places += allowed[place : place + length]
            place += length
        place += 1
    return places


def spactor_masks(source: list[int], keys: BlockKeys, row: int, rate: float, ids: Ids):
    """(masked places, what the generator reads) of a span-corrupted text: sentinels and </s> are never masked."""
    words = words_of(keys, row, Purpose.MASK, len(source) + 1)
    ordinary = [place for place, token in enumerate(source) if token != ids.eos and token < 1000]
    places = pick(words, math.floor(rate * len(ordinary) + uniform(words[-1])), ordinary)
    return places, [ids.mask if place in places else token for place, token in enumerate(source)]


def fill_uniforms(width: int, keys: BlockKeys, row: int, places: list[int]) -> list[float]:
    words = words_of(keys, row, Purpose.SAMPLE, width)
    return [uniform(words[place]) for place in places]
