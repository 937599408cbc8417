"""This process's random generators, which only dropout reads (masks and samples are functions of the seed)."""

from collections.abc import Mapping

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_metro.checkpoint.reader import RANDOM_PREFIX
from megatron_metro.parallel.groups import ParallelGroups


def read_random_states(kind: str) -> dict[str, Tensor]:
    """Copies of all generator states as uint8 vectors, on the CPU; `kind` is the device's, cuda or cpu."""
    states = {"cpu": torch.get_rng_state()}
    if kind == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    states.update({f"tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()})
    return {name: state.cpu().clone() for name, state in states.items()}


def restore_random_states(states: Mapping[str, Tensor]) -> None:
    """Put every generator back where `read_random_states` found it."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {name.removeprefix("tracker."): state for name, state in states.items() if name.startswith("tracker.")}
    tracker = get_cuda_rng_tracker()
    tracker.set_states({**tracker.get_states(), **tracked})


def random_tensors(kind: str, groups: ParallelGroups) -> list[ShardedTensor]:
    """This rank's row of each generator's state."""
    return [
        ShardedTensor(
            key=RANDOM_PREFIX + name,
            data=state.unsqueeze(0),
            dtype=state.dtype,
            local_shape=(1, state.numel()),
            global_shape=(groups.world_size, state.numel()),
            global_offset=(groups.rank, 0),
            axis_fragmentations=None,
            replica_id=(0, 0, 0),
        )
        for name, state in read_random_states(kind).items()
    ]
