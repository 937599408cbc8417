"""The bubble of both schedules with passes of a set length: (p - 1) / (m v + p - 1) of the ranks' time is idle."""

import time
from collections.abc import Callable

import pytest

from megatron_metro.config.schema import ParallelConfig
from megatron_metro.parallel.stage_plan import plan_stages
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.parity import GLOBAL_BATCH_SIZE, Case

pytestmark = pytest.mark.full

Pool = Callable[[int], WorkerPool]

NUM_ATTEMPTS = 3  # whatever else runs on the machine only adds to what is idle
UNIT_SECONDS = 0.5  # of one forward pass through a whole rank's share; backward takes twice as long


def measure_timeline(case: Case) -> list:
    """This rank's passes in one paced step; processes sleep, so that few cores suffice for all."""
    from torch.distributed import barrier

    from tests.helpers.pipeline import build_engine, microbatches_of, recording_schedule

    engine = build_engine(case)
    microbatches = microbatches_of(engine, case)
    engine.accumulate_gradients(microbatches)
    forward_seconds = UNIT_SECONDS / case.run.parallel.num_virtual_stages_per_pipeline_rank
    barrier()
    with recording_schedule(forward_seconds, 2 * forward_seconds) as events:
        engine.accumulate_gradients(microbatches)
    return events


@pytest.mark.parametrize(
    ("pp", "vpp", "micro_batch_size"),
    [(2, 1, 3), (2, 2, 3), (2, 5, 3), (3, 1, 2), (3, 2, 2), (3, 3, 4), (4, 1, 1), (4, 1, 3), (4, 2, 1), (4, 2, 3)],
)
def test_idle_share_is_the_formulas(
    pp: int, vpp: int, micro_batch_size: int, pool: Pool, record_property: Callable[[str, object], None]
) -> None:
    from tests.helpers.pipeline import even_cut, idle_share

    model = tiny.tiny_model()
    layout = even_cut(model, pp * vpp)
    parallel = ParallelConfig(
        pipeline_model_parallel_size=pp,
        num_virtual_stages_per_pipeline_rank=vpp,
        pipeline_model_parallel_layout=layout,
    )
    run = tiny.tiny_run(model, parallel)
    case = Case(run=run, micro_batch_size=micro_batch_size, layout=layout)
    expected = plan_stages(run, GLOBAL_BATCH_SIZE // micro_batch_size).bubble
    start = time.monotonic()
    found = 1.0
    for _ in range(NUM_ATTEMPTS):
        found = min(found, idle_share(pool(pp).run(measure_timeline, case, timeout=600.0)))
        if found <= expected + 0.02:
            break
    name = f"idle at p={pp} v={vpp} m={GLOBAL_BATCH_SIZE // micro_batch_size}"
    record_property(name, f"{100 * found:.2f} % (formula {100 * expected:.2f} %, {time.monotonic() - start:.0f} s)")
    assert abs(found - expected) <= 0.02
