"""Packed fine-tuning equals fine-tuning on padded rows in one process, at every layout; faults turn it red.

Three steps on the same examples, 24 padded rows or 12 packed ones: losses, gradients and updates.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers import mutations, tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.layouts import VARIANT_PLACES, Row
from tests.helpers.parity import Outcome, run_case, worst_error, worst_metric_error

Pool = Callable[[int], WorkerPool]

MODELS: dict[str, dict[str, Any]] = {
    "METRO": {"generator_num_layers": 0},
    "T5 v1.0": tiny.T5_V1_0,
    "T5 v1.1": tiny.T5_V1_1,
}
PLACES = [
    Row(micro_batch_size=3),
    Row(recompute="full"),
    Row(recompute="selective"),
    Row(tp=2),
    Row(tp=2, sp=True),
    Row(pp=2),
    Row(pp=2, vpp=2),
    Row(dp=2),
    Row(dp=2, distributed_optimizer=True, overlap=True),
]


def fine_tune(place: Row, model: str) -> Row:
    return replace(
        place,
        pairs="packed",
        num_steps=3,
        model=MODELS[model],
        model_name=model,
        objective={"objective": "text-to-text"},
    )


ROWS = [
    *(fine_tune(place, "METRO") for place in PLACES),
    *(fine_tune(place, "T5 v1.1") for place in (Row(tp=2, sp=True), Row(pp=2), Row(dp=2))),
]
EVERY_ROW = [fine_tune(place, model) for place in VARIANT_PLACES for model in MODELS]
MUTATIONS = [
    ("sources of others are seen", mutations.seen_sources, fine_tune(Row(), "T5 v1.0")),
    ("neighbours are seen", mutations.seen_neighbours, fine_tune(Row(), "T5 v1.0")),
    ("positions do not begin anew", mutations.counted_on, fine_tune(Row(), "METRO")),
    ("a wrong data-parallel divisor", mutations.local_divisor, fine_tune(Row(dp=2), "METRO")),
]


@pytest.fixture(scope="module")
def references() -> dict[str, Outcome]:
    """Padded rows in one process, run when first needed."""
    return {}


def find_reference(row: Row, references: dict[str, Outcome]) -> Outcome:
    key = row.reference_key()
    if key not in references:
        outcome = run_case(row.reference())
        assert outcome is not None
        references[key] = outcome
    return references[key]


def check(row: Row, pool: Pool, references: dict[str, Outcome]) -> None:
    expected = find_reference(row, references)
    found = run_case(row.case()) if row.world_size == 1 else pool(row.world_size).run(run_case, row.case())[0]
    assert worst_metric_error(found.metrics, expected.metrics) <= row.tolerance
    if found.gradients:
        assert worst_error(found.gradients, expected.gradients)[0] <= row.tolerance
    assert worst_error(found.updates, expected.updates)[0] <= row.tolerance


@pytest.mark.parametrize(("name", "mutate", "row"), MUTATIONS, ids=[name for name, _, _ in MUTATIONS])
def test_a_fault_turns_parity_red(
    name: str, mutate: Callable, row: Row, pool: Pool, groups: ParallelGroups, references: dict[str, Outcome]
) -> None:
    expected, case = find_reference(row, references), replace(row.case(), mutate=mutate, num_steps=1)
    found = run_case(case) if row.world_size == 1 else pool(row.world_size).run(run_case, case)[0]
    assert worst_error(found.gradients, expected.gradients)[0] > 1e3 * row.tolerance


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_packed_equals_padded(row: Row, pool: Pool, groups: ParallelGroups, references: dict[str, Outcome]) -> None:
    check(row, pool, references)


@pytest.mark.full
@pytest.mark.parametrize("row", EVERY_ROW, ids=lambda row: row.name)
def test_packed_equals_padded_at_every_layout(
    row: Row, pool: Pool, groups: ParallelGroups, references: dict[str, Outcome]
) -> None:
    check(row, pool, references)
