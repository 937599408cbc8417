"""The order of forward and backward passes on every rank: what the bubble and the memory of a pipeline follow from."""

from collections.abc import Callable

import pytest

from megatron_metro.config.schema import ParallelConfig
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.parity import GLOBAL_BATCH_SIZE, Case

Pool = Callable[[int], WorkerPool]


def record_order(case: Case) -> tuple[int, str]:
    """This rank's stage and its passes in one step, F and B."""
    from tests.helpers.pipeline import build_engine, microbatches_of, recording_schedule

    engine = build_engine(case)
    with recording_schedule() as events:
        engine.accumulate_gradients(microbatches_of(engine, case))
    return engine.groups.pp_rank, "".join(event.kind[0].upper() for event in events)


def expected_order(pp_rank: int, pp: int, vpp: int, count: int) -> str:
    """As many forward passes as fill the pipeline, then one forward and one backward in turn, then the rest."""
    warmup = pp - pp_rank - 1 if vpp == 1 else 2 * (pp - pp_rank - 1) + (vpp - 1) * pp
    warmup = min(warmup, count * vpp)
    return "F" * warmup + "FB" * (count * vpp - warmup) + "B" * warmup


@pytest.mark.parametrize(
    ("pp", "vpp", "micro_batch_size"),
    [(4, 1, 1), (4, 1, 6), (4, 2, 1), (4, 2, 3), (2, 1, 1), (2, 5, 1)],
)
def test_ranks_take_turns_as_the_schedule_says(pp: int, vpp: int, micro_batch_size: int, pool: Pool) -> None:
    from tests.helpers.pipeline import even_cut

    parallel = ParallelConfig(pipeline_model_parallel_size=pp, num_virtual_stages_per_pipeline_rank=vpp)
    run = tiny.tiny_run(parallel=parallel)
    case = Case(run=run, micro_batch_size=micro_batch_size, layout=even_cut(run.model, pp * vpp))
    count = GLOBAL_BATCH_SIZE // (micro_batch_size * (4 // pp))
    for pp_rank, order in pool(4).run(record_order, case):
        assert order == expected_order(pp_rank, pp, vpp, count)
        if vpp == 1:
            in_flight = max(order[:end].count("F") - order[:end].count("B") for end in range(len(order) + 1))
            assert in_flight == min(count, pp - pp_rank)
