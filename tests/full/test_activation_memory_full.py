"""1F1B's bound on activations at every number of stages, and of a model with most of its bytes in one stage."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.distributed.test_activation_memory import check_peaks, make_case, measure_peak
from tests.helpers.distributed import WorkerPool

pytestmark = pytest.mark.full

Pool = Callable[[int], WorkerPool]

LAYOUTS = {
    2: ["Gg|gMeeRDddL", "GggMeeRDdd|L"],
    3: ["G|ggMeeR|DddL", "GggM|ee|RDddL"],
    4: ["Gg|gMeeR|Dd|dL", "G|g|g|MeeRDddL"],
}


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize(
    ("world_size", "pp", "number"), [(4, 4, 0), (4, 4, 1), (4, 2, 0), (4, 2, 1), (3, 3, 0), (3, 3, 1)]
)
def test_a_stage_holds_no_more_microbatches_than_stages_follow(
    world_size: int,
    pp: int,
    number: int,
    recompute: str | None,
    pool: Pool,
    record_property: Callable[[str, object], None],
) -> None:
    case = replace(make_case(pp, recompute), layout=LAYOUTS[pp][number])
    peaks = pool(world_size).run(measure_peak, case)
    check_peaks(pp, peaks, is_exact=recompute is None)
    shares = ", ".join(f"{peak.whole_step / peak.one_microbatch:.2f}" for peak in peaks[:: world_size // pp])
    record_property(f"microbatches held at {case.layout} {recompute or 'no'} recompute", shares)
