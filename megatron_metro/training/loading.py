"""Load what `saving.py` wrote, at any layout, through megatron-core's dist_checkpointing; collective."""

import pickle
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from megatron_metro.checkpoint.folder import find_step, read_document
from megatron_metro.config.errors import CheckpointError, first_line
from megatron_metro.config.schema import RunConfig
from megatron_metro.parallel.agreement import gather_on_all, on_first_rank
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.training.model_space import (
    OPTIMIZER_PREFIX,
    device_kind,
    number,
    set_num_updates,
    tensors_to_load,
)
from megatron_metro.training.random_state import RANDOM_PREFIX, random_tensors, restore_random_states
from megatron_metro.training.state import TrainState, describe_layout

_FIRST_STAGE_WEIGHTS = ("generator.", "mlm_head.", "rtd_head.")
# What a damaged or foreign file makes torch, pickle and core raise; torch's own derives from BaseException.
_READ_ERRORS = (
    CheckpointException,
    CheckpointingException,
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    ValueError,
)


def load_checkpoint(
    config: RunConfig,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None,
    groups: ParallelGroups,
) -> TrainState | None:
    """Continue from --load: fills weights and optimizer, whatever layout wrote them, and returns where to go on.

    None when the folder holds no checkpoint yet (first start of a script that saves and loads in one place), unless
    --exit-on-missing-checkpoint. With --finetune the weights alone are loaded and the run starts at 0. Random states
    come back only at the layout that saved them; elsewhere dropout goes on from the seed. Raises CheckpointError.
    """
    assert config.checkpoint.load is not None
    folder = on_first_rank(lambda: find_step(config.checkpoint))
    if folder is None:
        return None
    document: dict[str, Any] = on_first_rank(lambda: read_document(folder))
    is_new_run = config.checkpoint.finetune
    with_moments = optimizer is not None and not is_new_run and not config.checkpoint.no_load_optim
    if with_moments and not document["optimizer"]["has_moments"]:
        raise CheckpointError(f"{folder}: was saved without optimizer state; add --no-load-optim or --finetune")
    weights = tensors_to_load(chunks, optimizer, with_moments=with_moments)
    kind = device_kind(chunks)
    generators: list[ShardedTensor] = []
    if not is_new_run and document["layout"] == describe_layout(config, groups, kind):
        generators = random_tensors(kind, groups)
    _check_contents(folder, [*weights, *generators], partial(_may_be_left, config))
    _read_tensors(folder, [*weights, *generators])
    if generators:
        restore_random_states({tensor.key.removeprefix(RANDOM_PREFIX): tensor.data[0] for tensor in generators})
    if with_moments:
        _restore_optimizer(optimizer, document["optimizer"])
    return TrainState() if is_new_run else TrainState(**document["train"])


def _restore_optimizer(optimizer: MegatronOptimizer, saved: dict[str, Any]) -> None:
    set_num_updates(optimizer, saved["num_updates"])
    scaler = getattr(optimizer, "grad_scaler", None)
    if scaler and saved["grad_scaler"]:
        numbers = saved["grad_scaler"]
        counters = {name: int(value) for name, value in numbers.items() if name != "scale"}
        scaler.load_state_dict({"scale": torch.tensor([numbers["scale"]], dtype=torch.float32), **counters})


def _may_be_left(config: RunConfig, key: str) -> bool:
    """Whether a weight of the step may have no place in this model.

    A new run takes what it finds. SPACTOR's second stage drops what only its first one trains.
    """
    is_second_stage = config.objective.objective == "spactor" and not config.model.has_generator
    return config.checkpoint.finetune or (is_second_stage and key.startswith(_FIRST_STAGE_WEIGHTS))


def _check_contents(folder: Path, wanted: Sequence[ShardedTensor], may_be_left: Callable[[str], bool]) -> None:
    """Compare names and shapes with what the step holds, on all ranks together, before anything is changed."""
    try:
        found = dist_checkpointing.load_tensors_metadata(str(folder))
        problem = _find_mismatch(wanted, {key: tuple(tensor.global_shape) for key, tensor in found.items()})
    except _READ_ERRORS as error:
        found, problem = {}, f"cannot be read ({first_line(error)})"
    answers = gather_on_all((problem, {tensor.key for tensor in wanted}))
    problem = next((text for text, _ in answers if text), None)
    left = {key for key in found if not key.startswith((OPTIMIZER_PREFIX, RANDOM_PREFIX))}
    left -= set().union(*(keys for _, keys in answers))
    left = {key for key in left if not may_be_left(key)}
    if problem is None and left:
        problem = f"holds {min(left)} ({len(left)} such tensors), which this model has not"
    if problem is not None:
        raise CheckpointError(f"{folder}: {problem}; use the configuration it was saved with, or another step")


def _find_mismatch(wanted: Sequence[ShardedTensor], found: dict[str, tuple[int, ...]]) -> str | None:
    for tensor in wanted:
        if tensor.key not in found:
            return f"holds no {tensor.key}"
        if found[tensor.key] != tensor.global_shape:
            return f"holds {tensor.key} of shape {found[tensor.key]}, this run has {tensor.global_shape}"
    return None


def _read_tensors(folder: Path, tensors: Sequence[ShardedTensor]) -> None:
    try:
        with warnings.catch_warnings():
            # Core still calls torch's reader by its old name.
            warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
            # Ranks that share a tensor all read it, so core's check for exactly one reader does not apply.
            dist_checkpointing.load(number(tensors), str(folder), validate_access_integrity=False)
    except _READ_ERRORS as error:
        raise CheckpointError(f"{folder}: cannot be read ({first_line(error)}); choose another step") from error
