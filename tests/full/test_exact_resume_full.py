"""Fifty steps of every kind of run in every layout, each resumed from disk and compared with the uninterrupted run."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers.distributed import WorkerPool
from tests.helpers.exact import KINDS, LAYOUTS, make_run, resume_and_compare, run_on, train_whole
from tests.helpers.markov import write_source

pytestmark = pytest.mark.full

Pool = Callable[[int], WorkerPool]

NUM_STEPS, NUM_RESUMED = 80, 50


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_anywhere_is_the_uninterrupted_one(
    kind: str, layout: str, pool: Pool, groups: ParallelGroups, tmp_path: Path, record_property: Callable
) -> None:
    source = write_source(tmp_path, num_documents=20, length=120)
    run = make_run(kind, layout, source, tmp_path / "whole", NUM_STEPS)
    run_on(pool, layout, train_whole, run, NUM_STEPS)
    saved = sorted(random.Random(f"{kind} {layout}").sample(range(1, NUM_STEPS), NUM_RESUMED))
    wrong = run_on(pool, layout, resume_and_compare, run, saved, 2, str(tmp_path / "rest"))
    record_property("steps resumed from", NUM_RESUMED)
    record_property("ranks that differ", sum(map(bool, wrong)))
    assert not any(wrong), wrong
