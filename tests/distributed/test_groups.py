"""Process groups of every layout of up to four processes, and what a changed layout leaves behind."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_metro.config.schema import ParallelConfig
from tests.helpers.distributed import WorkerPool

LAYOUTS = [(2, 1, 2), (2, 2, 1), (2, 1, 1), (4, 2, 2), (4, 4, 1), (4, 1, 4), (4, 2, 1), (4, 1, 2), (4, 1, 1)]


def make_parallel(tp: int, pp: int, vpp: int = 1) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, num_virtual_stages_per_pipeline_rank=vpp
    )


def describe_groups(tp: int, pp: int) -> dict[str, Any]:
    """This rank's coordinates, and the sums of all ranks over each group."""
    from megatron_metro.parallel.groups import all_reduce_sum, reinitialise

    groups = reinitialise(make_parallel(tp, pp))
    members = {
        name: int(all_reduce_sum(torch.tensor(10**groups.rank), getattr(groups, f"{name}_group")))
        for name in ("tp", "pp", "dp", "world")
    }
    return {
        "rank": groups.rank,
        "coordinates": (groups.pp_rank, groups.dp_rank, groups.tp_rank),
        "sizes": (groups.pp_size, groups.dp_size, groups.tp_size),
        "members": members,
        "embedding_groups": (groups.collection.embd, groups.collection.pos_embd),
    }


def members_of(ranks: list[int]) -> int:
    return sum(10**rank for rank in ranks)


@pytest.mark.parametrize(("world", "tp", "pp"), LAYOUTS)
def test_rank_grid_is_megatrons(world: int, tp: int, pp: int, pool: Callable[[int], WorkerPool]) -> None:
    dp = world // (tp * pp)
    grid = torch.arange(world).reshape(pp, dp, tp)
    for rank, result in enumerate(pool(world).run(describe_groups, tp, pp)):
        p, d, t = (int(index) for index in (grid == rank).nonzero()[0])
        assert result["rank"] == rank
        assert result["coordinates"] == (p, d, t)
        assert result["sizes"] == (pp, dp, tp)
        assert result["members"] == {
            "tp": members_of(grid[p, d].tolist()),
            "pp": members_of(grid[:, d, t].tolist()),
            "dp": members_of(grid[p, :, t].tolist()),
            "world": members_of(list(range(world))),
        }
        assert result["embedding_groups"] == (None, None)


def change_layout_often(num_changes: int) -> tuple[int, int, int, int]:
    """Threads and open files after a few changes of layout, and after many."""
    from megatron_metro.parallel.groups import reinitialise

    counts = []
    for change in range(num_changes):
        reinitialise(make_parallel(*[(2, 1), (1, 2), (1, 1)][change % 3]))
        if change in (2, num_changes - 1):
            counts += [len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))]
    return tuple(counts)  # type: ignore[return-value]


def test_layouts_leave_no_threads_or_sockets_behind(pool: Callable[[int], WorkerPool]) -> None:
    for threads, files, threads_later, files_later in pool(2).run(change_layout_often, 12):
        assert threads_later <= threads + 4
        assert files_later <= files + 8


def sum_in_new_groups() -> list[int | None]:
    """Two further groups that all processes make in the same order."""
    from megatron_metro.parallel.groups import all_reduce_sum, new_group, reinitialise

    groups = reinitialise(make_parallel(1, 2))
    made = [new_group([0, 1]), new_group([1])]
    return [None if group is None else int(all_reduce_sum(torch.tensor(groups.rank + 1), group)) for group in made]


def test_new_groups_have_members_and_outsiders(pool: Callable[[int], WorkerPool]) -> None:
    assert pool(2).run(sum_in_new_groups) == [[3, None], [3, 2]]


def reinitialise_wrongly() -> str:
    from megatron_metro.parallel.groups import reinitialise

    try:
        reinitialise(make_parallel(2, 2))
    except ValueError as error:
        return str(error)
    return "accepted"


def test_layouts_larger_than_the_job_are_refused_in_one_line(pool: Callable[[int], WorkerPool]) -> None:
    for message in pool(2).run(reinitialise_wrongly):
        assert message.startswith("--tensor-model-parallel-size 2 x --pipeline-model-parallel-size 2")
        assert message.endswith("start a multiple of 4") and "\n" not in message


def test_one_process_needs_no_launcher(groups: Any) -> None:
    assert (groups.world_size, groups.rank, groups.tp_size, groups.pp_size, groups.dp_size) == (1, 0, 1, 1, 1)


PROGRAM = """
from datetime import timedelta
from megatron_metro.config.schema import ParallelConfig
from megatron_metro.device import activate
from megatron_metro.parallel.groups import all_reduce_sum, initialise
import torch

if __name__ == "__main__":
    groups = initialise(ParallelConfig(tensor_model_parallel_size=2), activate("cpu"), timedelta(minutes=1))
    total = all_reduce_sum(torch.tensor(groups.rank + 1), groups.tp_group)
    print(f"rank {groups.rank} of {groups.world_size}: {int(total)}")
    groups.destroy()
"""


def test_torchrun_describes_the_job(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    for rank in (0, 1):  # the lines of two processes may run into each other
        assert f"rank {rank} of 2: 3" in result.stdout


def test_timeout_is_a_duration() -> None:
    from megatron_metro.parallel.groups import DEFAULT_TIMEOUT

    assert timedelta(minutes=ParallelConfig().distributed_timeout_minutes) == DEFAULT_TIMEOUT
