"""Whom the watchdog blames, as a function of what the ranks show of themselves."""

import pytest

from megatron_metro.training.watchdog import Beat, find_culprits, find_silent, find_slow


def beat(num_phases, *, waits=True):
    return Beat(number=7, num_phases=num_phases, phase="step", step=3, waits=waits)


@pytest.mark.parametrize(
    ("beats", "silent", "culprits", "word"),
    [
        ({0: beat(9), 1: beat(9), 2: beat(9)}, [1], [1], "no sign of life"),
        # A rank that sleeps in its loader while the others wait for its gradients.
        ({0: beat(9), 1: beat(8, waits=False), 2: beat(9)}, [], [1], "did not come"),
        # A rank that never leaves its forward pass: all are in one phase, the others wait in it.
        ({0: beat(9), 1: beat(9), 2: beat(9, waits=False)}, [], [2], "did not come"),
        # The others have not moved on either: those that compute ahead of a rank behind are not to blame.
        ({0: beat(9, waits=False), 1: beat(8), 2: beat(9)}, [], [1], "elsewhere"),
        ({0: beat(8), 1: beat(8, waits=False), 2: beat(8, waits=False), 3: beat(9)}, [], [1, 2], "did not come"),
        ({0: beat(9), 1: beat(9)}, [], [], "all ranks waited"),
        ({}, [], [], "nothing was heard"),
    ],
)
def test_the_rank_that_others_wait_for_is_blamed(beats, silent, culprits, word):
    found, text = find_culprits(beats, silent)
    assert found == culprits and word in text


@pytest.mark.parametrize(
    ("samples", "slow"),
    [
        ([(100, 90), (100, 5)], [1]),
        ([(100, 90), (100, 5), (80, 70), (90, 80)], [1]),
        ([(100, 40), (100, 5)], []),  # some waiting is usual
        ([(100, 5), (100, 5)], []),  # nobody waits
        ([(100, 90), (100, 90)], []),  # stages of a pipeline wait for each other
        ([(100, 3), (100, 5), (100, 95)], [0, 1]),
    ],
)
def test_a_rank_is_slow_where_others_wait_and_it_does_not(samples, slow):
    assert find_slow(samples) == slow


def test_a_rank_is_silent_without_a_new_beat_or_any_at_all():
    assert find_silent({0: 20.0, 1: 10.0, 3: 18.0}, world_size=4, since=18.0) == [1, 2]
