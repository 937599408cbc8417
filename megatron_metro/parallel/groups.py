"""Start torch.distributed and Megatron-Core's parallel state once; everything else reads a `ParallelGroups`.

Rank order is Megatron's: tensor-parallel neighbours are adjacent, then data-parallel, then pipeline stages.
"""

import gc
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_metro.config.errors import ConfigError, PeerError, first_line
from megatron_metro.config.schema import ParallelConfig
from megatron_metro.device import Device

DEFAULT_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelGroups:
    """This process's place in the grid of tensor-parallel x data-parallel x pipeline ranks."""

    world_size: int
    rank: int
    tp_size: int
    tp_rank: int
    pp_size: int
    pp_rank: int
    dp_size: int
    dp_rank: int
    world_group: ProcessGroup
    tp_group: ProcessGroup
    pp_group: ProcessGroup
    dp_group: ProcessGroup
    # Everything core's layers, schedules, DDP and optimizer ask for. No embedding groups: `shared_weights` sums the
    # copies of shared weights, wherever they live, and core's own synchronisation must stay off.
    collection: ProcessGroupCollection
    timeout: timedelta  # after which a silent peer ends the job

    def destroy(self) -> None:
        """End all process groups of this process."""
        _destroy_model_parallel()
        dist.destroy_process_group()


def find_place() -> tuple[int, int]:
    """(rank, processes) of the job that torchrun describes in the environment; (0, 1) where it describes none.

    Raises ConfigError when the description has gaps: half of it is left over from another job or set by hand.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if os.environ.get("WORLD_SIZE", "1") == "1" and "RANK" not in os.environ:
        return 0, 1
    missing = [name for name in needed if name not in os.environ]
    if missing:
        found = ", ".join(f"{name}={os.environ[name]}" for name in needed if name in os.environ)
        raise ConfigError(f"torchrun: the environment has {found} without {' and '.join(missing)}; start with torchrun")
    rank, world_size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise ConfigError(f"torchrun: RANK={rank} of WORLD_SIZE={world_size} is no place; start with torchrun")
    return int(rank), int(world_size)


def initialise(
    parallel: ParallelConfig, device: Device, timeout: timedelta = DEFAULT_TIMEOUT, agreed: Sequence[str] = ()
) -> ParallelGroups:
    """Join the job that torchrun describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or start a job of one process.

    `agreed` are lines that must be the same on all ranks. Raises ConfigError when they are not, or when the number of
    processes does not fit the layout; PeerError when not all of them come within `timeout`.
    """
    _, world_size = find_place()
    _check_world_size(parallel, world_size)
    if "RANK" in os.environ:
        _bind_to_loopback_on_one_node(world_size)
        _join(device.backend, world_size, timeout)
    else:
        dist.init_process_group(device.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        # Before any further group: ranks of unlike layouts would wait for each other in groups that never form.
        _check_equal_on_all_ranks(agreed)
    except ConfigError:
        dist.destroy_process_group()
        raise
    return _initialise_model_parallel(parallel, timeout)


def reinitialise(parallel: ParallelConfig, timeout: timedelta = DEFAULT_TIMEOUT) -> ParallelGroups:
    """Leave the present layout and take up another in the living processes; all of them call it together."""
    _check_world_size(parallel, dist.get_world_size())
    if parallel_state.model_parallel_is_initialized():
        gc.collect()  # a group ends with its last reference, and models hold theirs in reference cycles
        dist.barrier()  # nobody may still be receiving from a group that is about to close
        _destroy_model_parallel()
    return _initialise_model_parallel(parallel, timeout)


def single_process(device: Device) -> ParallelGroups:
    """The groups of one process on its own, started on the first call (for tools and tests)."""
    if dist.is_initialized():
        return reinitialise(ParallelConfig())
    return initialise(ParallelConfig(), device)


def new_group(ranks: Sequence[int], timeout: timedelta = DEFAULT_TIMEOUT) -> ProcessGroup | None:
    """A further group of global ranks; None for a process outside it. Every process calls it, in the same order."""
    group = dist.new_group(list(ranks), timeout=timeout)
    return group if dist.get_rank() in ranks else None


def all_reduce_sum(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the group, in place; `tensor` itself is returned. No backward."""
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def is_store_in_launcher() -> bool:
    """Whether torchrun holds the job's store, and not the process of rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def holds_first_rank(group: ProcessGroup | None) -> bool:
    """Whether rank 0 of the job is in this group, as in the one group of several alike that speaks for all."""
    return 0 in dist.get_process_group_ranks(group)


def _join(backend: str, world_size: int, timeout: timedelta) -> None:
    try:
        dist.init_process_group(backend, init_method="env://", timeout=timeout)
    except (dist.DistError, RuntimeError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise PeerError(
            f"torchrun: not all {world_size} processes of the job met at {place} within {timeout.total_seconds():g} s "
            f"({first_line(error)}); look for what ended the others, or raise --distributed-timeout-minutes"
        ) from error


def _check_equal_on_all_ranks(lines: Sequence[str]) -> None:
    """Raise ConfigError on every rank where the lines of one differ from those of rank 0. Collective."""
    everything: list[Sequence[str]] = [()] * dist.get_world_size()
    dist.all_gather_object(everything, lines)
    for rank, others in enumerate(everything):
        for mine, other in zip_longest(everything[0], others, fillvalue="nothing"):
            if mine != other:
                raise ConfigError(f"rank {rank} has {other} and rank 0 has {mine}; start all ranks alike")


def all_gather(tensor: Tensor, group: ProcessGroup) -> list[Tensor]:
    """The tensors of all ranks, which have one shape, in the order of the group. No backward."""
    gathered = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(gathered, tensor, group=group)
    return gathered


def broadcast(tensor: Tensor, source: int, group: ProcessGroup) -> Tensor:
    """What rank `source` of the group holds, in place on the others; `tensor` itself is returned. No backward."""
    dist.broadcast(tensor, src=dist.get_global_rank(group, source), group=group)
    return tensor


def _check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size % (tp * pp) != 0:
        raise ConfigError(
            f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp} does not divide the "
            f"{world_size} processes of this job; start a multiple of {tp * pp}"
        )


def _bind_to_loopback_on_one_node(world_size: int) -> None:
    """Keep gloo off the network when all processes are on this machine (its host name may resolve to nowhere)."""
    is_one_node = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == world_size
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if is_one_node and loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)


def _first_rank_only(pipeline_ranks: list[int], _split_rank: int | None = None) -> list[int]:
    """Embedding groups of one rank, which core has nothing to sum over (torch makes no group of none)."""
    return pipeline_ranks[:1]


def _initialise_model_parallel(parallel: ParallelConfig, timeout: timedelta) -> ParallelGroups:
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        distributed_timeout_minutes=timeout / timedelta(minutes=1),
        get_embedding_ranks=_first_rank_only,
        get_position_embedding_ranks=_first_rank_only,
        create_gloo_process_groups=False,
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    collection.embd, collection.pos_embd = None, None
    return ParallelGroups(
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        tp_size=collection.tp.size(),
        tp_rank=collection.tp.rank(),
        pp_size=collection.pp.size(),
        pp_rank=collection.pp.rank(),
        dp_size=collection.dp.size(),
        dp_rank=collection.dp.rank(),
        world_group=_world_group(),
        tp_group=collection.tp,
        pp_group=collection.pp,
        dp_group=collection.dp,
        collection=collection,
        timeout=timeout,
    )


def _world_group() -> ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "torch.distributed is initialised"
    return group


def _destroy_model_parallel() -> None:
    """Forget core's groups and close them; core itself only forgets, and their threads and sockets would pile up."""
    groups = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    for group in groups:
        if group is not None:  # core's name for the world
            dist.destroy_process_group(group)
