"""Bytes on every boundary of every kind of layout of the tiny model, in both precisions."""

import random
from collections.abc import Callable

import pytest

from megatron_metro.config.chain import build_chain
from megatron_metro.config.schema import ParallelConfig
from tests.distributed.test_messages import check_traffic, make_case, measure_traffic
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.pipeline import random_cut

pytestmark = pytest.mark.full

Pool = Callable[[int], WorkerPool]

# Processes, tensor-parallel size, stages; what is left are replicas.
GRIDS = [(4, 1, 2), (4, 1, 4), (4, 2, 2), (3, 1, 3), (2, 1, 2)]
MODELS = {"metro": tiny.tiny_model(), "spans": tiny.tiny_model(generator_num_layers=0)}
CUTS = [
    (*grid, vpp, name)
    for grid in GRIDS
    for vpp in (1, 2, 3, 4)
    for name, model in MODELS.items()
    if grid[2] * vpp <= len(build_chain(model))
]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("world_size", "tp", "pp", "vpp", "model_name"), CUTS)
def test_messages_are_the_planned_ones(
    world_size: int, tp: int, pp: int, vpp: int, model_name: str, bf16: bool, pool: Pool
) -> None:
    model, spans = MODELS[model_name], model_name == "spans"
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        pipeline_model_parallel_size=pp,
        num_virtual_stages_per_pipeline_rank=vpp,
        pipeline_model_parallel_layout=random_cut(random.Random(100 * pp + vpp + spans), model, pp * vpp),
    )
    # 12 sequences: 6 microbatches for two replicas or three stages, 4 for four stages.
    size = {2: 1 if world_size == 4 and tp == 1 else 2, 3: 2, 4: 3}[pp]
    case = make_case(parallel, bf16=bf16, spans=spans, micro_batch_size=size)
    check_traffic(case, pool(world_size).run(measure_traffic, case))
