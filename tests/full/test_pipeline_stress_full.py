"""200 short runs of pipelines drawn at random, 100 of them interleaved on two or three stages."""

from collections.abc import Callable

import pytest

from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers.distributed import WorkerPool
from tests.helpers.stress import StressRun, check_stress_run, draw_stress_runs

pytestmark = pytest.mark.full

Pool = Callable[[int], WorkerPool]


@pytest.mark.parametrize("stress_run", draw_stress_runs(200, seed=2), ids=lambda drawn: drawn.name)
def test_random_pipeline(stress_run: StressRun, pool: Pool, groups: ParallelGroups) -> None:
    check_stress_run(stress_run, pool(stress_run.world_size))
