"""Layouts change nothing: a sample of the parity matrix against one process, and faults that must turn it red.

The complete matrix is in tests/full/test_parity_matrix.py; `python -m tests.helpers.parity_table` prints it.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from megatron_metro.config.objectives import PRETRAINING
from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers import mutations, tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.layouts import OBJECTIVE_VARIANTS, Row, made_row
from tests.helpers.parity import Case, Outcome, run_case, worst_error, worst_metric_error

Pool = Callable[[int], WorkerPool]

WIDE_GENERATOR = {**tiny.SPACTOR, "generator_hidden_size": 24, "activation": "gated-gelu", "untie_mlm_head": False}
OWN_MATRIX = {**tiny.NARROW_GENERATOR, "untie_mlm_head": True, "mlm_head": "linear", "rtd_head": "gelu"}

VARIED = [
    {"model_name": name, **variant, "num_steps": 2}
    for name, variant in OBJECTIVE_VARIANTS.items()
    if name not in PRETRAINING  # those are below, with batches of their own
]
VARIED_PLACES = (Row(tp=2, sp=True), Row(pp=2), Row(pp=2, vpp=2))
MADE_PLACES = (Row(tp=2, sp=True), Row(pp=2), Row(dp=2))

ROWS = [
    # one process
    Row(micro_batch_size=2),
    Row(recompute="full"),
    Row(recompute="selective"),
    Row(padded=True),
    # two
    Row(tp=2),
    Row(tp=2, sp=True),
    Row(tp=2, sp=True, recompute="full"),
    Row(tp=2, sp=True, padded=True),
    Row(tp=2, sp=True, model={"generator_embedding_sharing": "token_pos_norm"}),
    Row(dp=2),
    Row(dp=2, micro_batch_size=1, overlap=True),
    Row(dp=2, distributed_optimizer=True, overlap=True),
    Row(dp=2, distributed_optimizer=True),
    Row(pp=2),
    Row(pp=2, vpp=2),
    Row(pp=2, few_ids=True),
    Row(pp=2, vpp=3, micro_batch_size=1, recompute="full"),
    Row(pp=2, spans=True, model={"generator_num_layers": 0}),
    Row(pp=2, padded=True, model={"generator_embedding_sharing": "token_pos_norm", "rtd_head": "simple"}),
    Row(tp=2, sp=True, spans=True, model=tiny.T5_V1_1, model_name="T5 v1.1"),
    Row(tp=2, sp=True, model=tiny.NARROW_GENERATOR, model_name="narrow generator"),
    Row(tp=2, model=tiny.SPACTOR, model_name="SPACTOR"),
    Row(dp=2, distributed_optimizer=True, overlap=True, model=OWN_MATRIX, model_name="own matrix"),
    Row(pp=2, layout="Gg|gMeeRDddL", padded=True, model=tiny.NARROW_GENERATOR, model_name="narrow generator"),
    # objectives and ablations beside METRO
    *(replace(place, **variant) for variant in VARIED for place in VARIED_PLACES),
    Row(pp=2, layout="GggMeeR|L", model_name="coco-lm", num_steps=2, **OBJECTIVE_VARIANTS["coco-lm"]),
    # every objective on batches that it makes itself, with T5's architecture for every other
    *(made_row(place, name, "METRO" if i % 2 else "T5") for i, name in enumerate(PRETRAINING) for place in MADE_PLACES),
    # three
    Row(pp=3),
    Row(pp=3, vpp=4, micro_batch_size=1, model={"decoder_num_layers": 4}),
    Row(pp=3, layout="Gg|gMe|eRDddL"),
    Row(pp=3, vpp=3, micro_batch_size=1, model=tiny.NARROW_GENERATOR, model_name="narrow generator"),
    # four
    Row(tp=4, sp=True, recompute="selective"),
    Row(tp=2, sp=True, pp=2),
    Row(tp=2, sp=True, pp=2, vpp=2, micro_batch_size=3),
    Row(tp=2, sp=True, pp=2, layout="G|ggMeeRDddL", model=WIDE_GENERATOR, model_name="wide SPACTOR generator"),
    Row(tp=2, sp=True, dp=2),
    Row(tp=2, sp=True, dp=2, distributed_optimizer=True, overlap=True),
    Row(pp=2, vpp=2, dp=2, micro_batch_size=1),
    Row(pp=2, vpp=2, dp=2, micro_batch_size=1, distributed_optimizer=True, overlap=True),
    Row(pp=4),
    Row(pp=4, vpp=2, micro_batch_size=3),
]


@pytest.fixture(scope="module")
def references() -> dict[str, Outcome]:
    """One-process outcomes, computed when first needed."""
    return {}


def _reference(row: Row, references: dict[str, Outcome]) -> Outcome:
    key = row.reference_key()
    if key not in references:
        outcome = run_case(row.reference())
        assert outcome is not None
        references[key] = outcome
    return references[key]


# Before the rows, which begin on two processes too.
MUTATIONS: list[tuple[str, Callable, Row]] = [
    ("a dropped injected loss", mutations.dropped_injection, Row(pp=2)),
    ("a skipped shared-weight sum", mutations.skipped_shared_sum, Row(pp=2)),
    ("a missing sequence_parallel mark", mutations.missing_sequence_mark, Row(tp=2, sp=True)),
    ("an off-by-one slot", mutations.shifted_slot, Row(tp=2)),
    ("a wrong data-parallel divisor", mutations.local_divisor, Row(dp=2)),
    ("fills shifted at a boundary", mutations.shifted_ids, Row(pp=2, few_ids=True)),
]


@pytest.mark.parametrize(("name", "mutate", "row"), MUTATIONS, ids=[name for name, _, _ in MUTATIONS])
def test_fault_turns_parity_red(
    name: str, mutate: Callable, row: Row, pool: Pool, groups: ParallelGroups, references: dict[str, Outcome]
) -> None:
    expected = _reference(row, references)
    case: Case = replace(row.case(), mutate=mutate, num_steps=1)
    found: Outcome = pool(row.world_size).run(run_case, case)[0]
    assert worst_error(found.gradients, expected.gradients)[0] > 1e3 * row.tolerance


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_layout_changes_nothing(row: Row, pool: Pool, groups: ParallelGroups, references: dict[str, Outcome]) -> None:
    expected = _reference(row, references)
    case = row.case()
    found: Outcome = run_case(case) if row.world_size == 1 else pool(row.world_size).run(run_case, case)[0]
    if expected.sampled_ids is not None:
        np.testing.assert_array_equal(found.sampled_ids, expected.sampled_ids)
    assert worst_metric_error(found.metrics, expected.metrics) <= row.tolerance
    if found.gradients:
        assert worst_error(found.gradients, expected.gradients)[0] <= row.tolerance
    assert worst_error(found.updates, expected.updates)[0] <= row.tolerance
