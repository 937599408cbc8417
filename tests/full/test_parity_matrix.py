"""The complete parity matrix: layouts, optimizers, models and cuts of the chain, all against one process.

`python -m tests.helpers.parity_table` prints the rows one by one.
"""

import random
from collections.abc import Callable, Iterator, Sequence

import pytest

from megatron_metro.config.objectives import PRETRAINING
from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers.distributed import WorkerPool
from tests.helpers.layouts import Row, all_rows, matrix, overlap_rows
from tests.helpers.parity_table import Errors, References, format_row, measure

pytestmark = pytest.mark.full

Pool = Callable[[int], WorkerPool]
NUM_SAMPLED_ON_EIGHT = 40
GROUPS = matrix()


@pytest.fixture(scope="module")
def references() -> References:
    return References()


@pytest.fixture
def eight_workers(pool: Pool) -> Iterator[WorkerPool]:
    pool(1)  # ends the workers of earlier tests; starts none before it is used
    workers = WorkerPool(8, max_world_size=8)
    yield workers
    workers.close()


def check_rows(rows: Sequence[Row], workers: WorkerPool, references: References, record: Callable) -> None:
    """Measure all rows, then fail with the table of those that missed."""
    found: list[tuple[Row, Errors]] = [(row, measure(row, workers, references)) for row in rows]
    record("rows", len(rows))
    for is_single, kind in ((False, "float64"), (True, "FP32")):
        errors = [e for row, e in found if row.is_single == is_single]
        if errors:
            worst = max(max(e.losses, e.gradients or 0.0, e.updates) for e in errors)
            record(f"worst error in {kind}", f"{worst:.0e}")
    missed = [format_row(row, errors) for row, errors in found if not errors.are_within(row.tolerance)]
    assert not missed, "\n".join([f"{len(missed)} of {len(rows)} rows", *missed])


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", GROUPS)
def test_layouts_change_nothing(
    name: str, pool: Pool, groups: ParallelGroups, references: References, record_property: Callable
) -> None:
    rows = GROUPS[name]
    check_rows(rows, pool(rows[0].world_size), references, record_property)


@pytest.mark.timeout(7200)
def test_a_sample_of_layouts_on_eight_processes(
    eight_workers: WorkerPool, groups: ParallelGroups, references: References, record_property: Callable
) -> None:
    rows = random.Random(8).sample([*all_rows(8), *overlap_rows(8)], NUM_SAMPLED_ON_EIGHT)
    check_rows(rows, eight_workers, references, record_property)


def test_the_matrix_is_complete() -> None:
    cuts = {name: len(rows) for name, rows in GROUPS.items() if "every cut" in name}
    assert cuts == {
        "2: every cut into 2 x 1 pieces": 10,
        "2: every cut into 2 x 2 pieces": 120,
        "2: every cut into 2 x 3 pieces": 252,
        "2: every cut into 2 x 4 pieces": 120,
        "2: every cut into 2 x 5 pieces": 10,
        "3: every cut into 3 x 1 pieces": 45,
        "3: every cut into 3 x 2 pieces": 252,
        "3: every cut into 3 x 3 pieces": 45,
    }
    made = {
        (row.objective["objective"], row.tp, row.sp, row.pp, row.dp)
        for rows in GROUPS.values()
        for row in rows
        if row.made
    }
    places = [(2, True, 1, 1), (1, False, 2, 1), (1, False, 1, 2), (2, True, 2, 1)]
    assert {(name, *place) for name in PRETRAINING for place in places} <= made
    generators = [row.layout.split("M")[0] for rows in GROUPS.values() for row in rows if row.layout and row.pp == 3]
    assert {len(set(range(text.count("|") + 1))) for text in generators} >= {1, 2, 3}
    assert all(len({row.name for row in rows}) == len(rows) for rows in GROUPS.values())
