"""Short runs of pipelines drawn at random: none hangs, and every loss is that of one process."""

from collections.abc import Callable

import pytest

from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers.distributed import WorkerPool
from tests.helpers.stress import StressRun, check_stress_run, draw_stress_runs

Pool = Callable[[int], WorkerPool]


# Two processes have runs of their own in the full tier; here each further number of processes costs more than its runs.
SAMPLE = [drawn for drawn in draw_stress_runs(12, seed=1) if drawn.world_size > 2]


@pytest.mark.parametrize("stress_run", SAMPLE, ids=lambda drawn: drawn.name)
def test_random_pipeline(stress_run: StressRun, pool: Pool, groups: ParallelGroups) -> None:
    check_stress_run(stress_run, pool(stress_run.world_size))


def test_the_draw_covers_what_is_promised() -> None:
    """200 runs, at least 50 of them interleaved on two or three stages."""
    drawn = draw_stress_runs(200, seed=2)
    layouts = [(run.case.run.parallel, run.case) for run in drawn]
    interleaved = [p for p, _ in layouts if p.num_virtual_stages_per_pipeline_rank > 1]
    assert sum(p.pipeline_model_parallel_size in (2, 3) for p in interleaved) >= 50
    assert {p.pipeline_model_parallel_size for p, _ in layouts} == {2, 3, 4}
    assert {p.recompute_granularity for p, _ in layouts} == {None, "selective", "full"}
    assert {case.dtype for _, case in layouts} == {run.dtype for run in drawn}
    assert all(p.deallocate_pipeline_outputs and p.overlap_p2p_communication for p, _ in layouts)
    for trait in ("sequence_parallel", "use_distributed_optimizer", "overlap_grad_reduce"):
        assert any(getattr(p, trait) for p, _ in layouts)
    assert any(case.spans for _, case in layouts) and any(case.padded for _, case in layouts)
    assert len({case.layout for _, case in layouts}) > 100
