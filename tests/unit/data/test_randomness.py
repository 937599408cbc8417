"""Random words against an independent Philox, golden bytes, and what the mappings promise."""

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_metro.data.order import NUM_ROUND_WORDS, permute
from megatron_metro.data.randomness import (
    BlockKeys,
    Purpose,
    choose,
    draw_words,
    draw_words_once,
    to_integers,
    to_uniforms,
)

MASK = 2**64 - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as Salmon et al. 2011 write it, one counter at a time."""
    for _ in range(10):
        high0, low0 = divmod(counter[0] * 0xD2E7470EE14C6C93, 2**64)
        high1, low1 = divmod(counter[2] * 0xCA5A826395121157, 2**64)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
    return counter


def make_keys(blocks: list[int], seed: int = 1234, identity: int = 99, epoch: int = 2) -> BlockKeys:
    n = len(blocks)
    return BlockKeys(
        seed=seed,
        identity=np.full(n, identity, np.uint64),
        epoch=np.full(n, epoch, np.int64),
        block=np.array(blocks, np.int64),
    )


def test_words_are_philox_of_key_and_counter():
    words = draw_words(make_keys([5, 2**40]), Purpose.SAMPLE, 9)
    for row, block in enumerate((5, 2**40)):
        expected = [word for i in (1, 2, 3) for word in philox([i, block, 2, Purpose.SAMPLE], [1234, 99])]
        assert words[row].tolist() == expected[:9]


def test_golden_bytes():
    words = draw_words(make_keys([0, 1, 2]), Purpose.MASK, 100)
    digest = hashlib.sha256(words.astype("<u8").tobytes()).hexdigest()
    assert digest == "d8609f5ed3166bdf53f1375f93ebb6d61d9210ed628f8afc205e377894e9189f"


def test_a_row_depends_on_its_own_key_alone():
    together = draw_words(make_keys([7, 3, 9]), Purpose.MASK, 50)
    for row, block in enumerate((7, 3, 9)):
        assert np.array_equal(together[row], draw_words(make_keys([block]), Purpose.MASK, 50)[0])
    others = [
        draw_words(make_keys([7], seed=1), Purpose.MASK, 50),
        draw_words(make_keys([7], identity=1), Purpose.MASK, 50),
        draw_words(make_keys([7], epoch=1), Purpose.MASK, 50),
        draw_words(make_keys([7]), Purpose.SAMPLE, 50),
    ]
    assert not any(np.array_equal(together[0], other[0]) for other in others)


def test_uniforms_and_integers_at_their_ends():
    ends = np.array([0, MASK], dtype=np.uint64)
    assert to_uniforms(ends).tolist() == [0.0, 1.0 - 2.0**-53]
    assert to_integers(ends, 7).tolist() == [0, 6]
    assert to_integers(ends, 2**32 - 1).tolist() == [0, 2**32 - 2]


@given(
    num_items=st.integers(1, 70),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_choose_takes_exactly_so_many_candidates(num_items, data):
    counts, rows = [], []
    for _ in range(3):
        candidates = data.draw(st.lists(st.booleans(), min_size=num_items, max_size=num_items))
        rows.append(candidates)
        counts.append(data.draw(st.integers(0, sum(candidates))))
    words = draw_words(make_keys([1, 2, 3], seed=num_items), Purpose.MASK, num_items)
    chosen = choose(words, np.array(counts), np.array(rows))
    assert chosen.sum(axis=1).tolist() == counts
    assert not (chosen & ~np.array(rows)).any()


def test_choose_breaks_ties_by_position():
    chosen = choose(np.zeros((1, 5), np.uint64), np.array([2]))
    assert chosen.tolist() == [[True, True, False, False, False]]


def test_choose_is_uniform():
    words = draw_words(make_keys(list(range(20_000))), Purpose.MASK, 10)
    frequencies = choose(words, np.full(20_000, 3)).mean(axis=0)
    assert np.abs(frequencies - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / 20_000)


@given(num_items=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(num_items, seed):
    words = draw_words_once(seed, 1, Purpose.ORDER, 0, NUM_ROUND_WORDS)
    permuted = permute(np.arange(num_items), num_items, words)
    assert np.array_equal(np.sort(permuted), np.arange(num_items))


def test_permute_visits_every_order_of_few_items_equally_often():
    counts: dict[bytes, int] = {}
    for epoch in range(6000):
        words = draw_words_once(1, 2, Purpose.ORDER, epoch, NUM_ROUND_WORDS)
        order = permute(np.arange(4), 4, words).astype(np.int8).tobytes()
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    chi_square = sum((count - 250) ** 2 / 250 for count in counts.values())
    assert chi_square < 60  # 23 degrees of freedom: p < 1e-4


def test_permute_needs_no_table():
    words = draw_words_once(1, 2, Purpose.ORDER, 0, NUM_ROUND_WORDS)
    places = permute(np.array([0, 10**11, 10**12 - 1]), 10**12, words)
    assert len(set(places.tolist())) == 3
    assert (places < 10**12).all()
