"""Every layout goes on from what every other one saved: all pairs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers.distributed import WorkerPool
from tests.helpers.layouts import Row, made_row
from tests.helpers.resuming import LAST_STEP, Stretch, check_continuation, go_on, run_on, save_early, train

pytestmark = pytest.mark.full

Pool = Callable[[int], WorkerPool]

DOUBLE = [
    Row(),
    Row(dp=2),
    Row(tp=2),
    Row(tp=2, sp=True),
    Row(pp=2),
    Row(pp=2, vpp=2),
    Row(pp=2, vpp=3, layout="G|gg|Me|e|R|DddL"),
    Row(pp=3),
    Row(pp=3, vpp=2),
    Row(tp=4, sp=True),
    Row(tp=2, sp=True, pp=2),
    Row(tp=2, sp=True, pp=2, vpp=2),
    Row(tp=2, dp=2),
    Row(pp=2, vpp=2, dp=2, micro_batch_size=1),
    Row(pp=4),
    Row(pp=4, vpp=2, micro_batch_size=3),
]
SINGLE = [
    Row(single_precision=True),
    Row(dp=2, distributed_optimizer=True),
    Row(dp=2, distributed_optimizer=True, overlap=True),
    Row(tp=2, sp=True, single_precision=True),
    Row(pp=2, vpp=2, single_precision=True),
    Row(dp=3, distributed_optimizer=True),
    Row(pp=3, single_precision=True),
    Row(dp=4, micro_batch_size=3, distributed_optimizer=True, overlap=True),
    Row(tp=2, sp=True, dp=2, distributed_optimizer=True, overlap=True),
    Row(pp=2, vpp=2, dp=2, micro_batch_size=1, distributed_optimizer=True, overlap=True),
    Row(pp=4, single_precision=True),
]
SPACTOR = [
    made_row(place, "spactor", "T5")
    for place in (
        Row(tp=2, sp=True, single_precision=True),
        Row(dp=2, distributed_optimizer=True, overlap=True),
        Row(pp=2, vpp=2, single_precision=True),
    )
]
# The same numbers of stages cut elsewhere: within the generator, the encoder, the decoder, between any two of them.
CUTS = [
    Row(pp=2, layout="Gg|gMeeRDddL"),
    Row(pp=2, layout="GggMe|eRDddL"),
    Row(pp=2, layout="GggMeeRDd|dL"),
    Row(pp=2, vpp=2, layout="G|ggMee|RD|ddL"),
    Row(pp=3, layout="GggM|eeRDd|dL"),
    Row(pp=3, layout="Gg|gMee|RDddL"),
    Row(pp=4, layout="Ggg|Mee|RDd|dL"),
]
SINGLE_CUTS = [replace(row, single_precision=True) for row in CUTS[:6]] + [
    replace(CUTS[1], dp=2, distributed_optimizer=True, overlap=True)
]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "rows",
    [DOUBLE, SINGLE, SPACTOR, CUTS, SINGLE_CUTS],
    ids=["float64", "fp32", "spactor-fp32", "cuts-float64", "cuts-fp32"],
)
def test_every_layout_goes_on_from_every_other(
    rows: list[Row], pool: Pool, groups: ParallelGroups, tmp_path: Path, record_property: Callable
) -> None:
    expected = train(rows[0].reference(), 0, LAST_STEP)
    assert expected is not None
    for saved, row in enumerate(rows):
        run_on(pool, row, save_early, tmp_path / str(saved))
    errors: dict[str, float] = {}
    failures: list[str] = []
    for loading in rows:
        for saved, saving in enumerate(rows):
            found: Stretch = run_on(pool, loading, go_on, tmp_path / str(saved))
            try:
                errors[f"{saving.name} -> {loading.name}"] = check_continuation(found, expected, loading.tolerance)
            except AssertionError as failure:
                failures.append(f"{saving.name} -> {loading.name}: {failure}")
    record_property("pairs", len(rows) ** 2)
    assert not failures, "\n".join(failures)
    record_property("worst error", f"{max(errors.values()):.0e}")
