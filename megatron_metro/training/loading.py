"""Load what `saving.py` wrote, at any layout; collective.

Files are read by `checkpoint/reader.py` and not by core's dist_checkpointing, which runs what it reads: it unpickles
`.metadata` and byte items. Each rank copies its own boxes of each tensor, so nothing is sent but what ranks agree on.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_metro.checkpoint.reader import RANDOM_PREFIX, StepReader
from megatron_metro.checkpoint.start import find_start
from megatron_metro.checkpoint.tensor_index import read_index
from megatron_metro.config.errors import CheckpointError
from megatron_metro.config.schema import ModelConfig, RunConfig
from megatron_metro.parallel.agreement import gather_on_all, on_every_rank, on_first_rank
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.training.model_space import (
    device_kind,
    set_num_updates,
    tensors_to_load,
)
from megatron_metro.training.random_state import random_tensors, restore_random_states
from megatron_metro.training.state import TrainState, describe_layout, restore_state
from megatron_metro.training.verification import verify_on_all

LOGGER = logging.getLogger(__name__)

_FIRST_STAGE_WEIGHTS = ("generator.", "mlm_head.", "rtd_head.")


def load_checkpoint(
    config: RunConfig,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None,
    groups: ParallelGroups,
) -> TrainState | None:
    """Continue from --load: fills weights and optimizer, whatever layout wrote them, and returns where to go on.

    None when the folder holds no checkpoint yet (first start of a script that saves and loads in one place), unless
    --exit-on-missing-checkpoint. With --finetune, and from --pretrained-checkpoint, the weights alone are loaded and
    the run starts at 0. Random states come back only at the layout that saved them; elsewhere dropout goes on from the
    seed. Raises CheckpointError.
    """
    start = on_first_rank(lambda: find_start(config.checkpoint))
    if start.step is None:
        return None
    folder, document, is_new_run = start.step, start.document, start.is_new_run
    verify_on_all(folder)
    with_moments = optimizer is not None and not is_new_run and not config.checkpoint.no_load_optim
    if with_moments and not document["optimizer"]["has_moments"]:
        raise CheckpointError(f"{folder}: was saved without optimizer state; add --no-load-optim or --finetune")
    weights = tensors_to_load(chunks, optimizer, with_moments=with_moments)
    kind = device_kind(chunks)
    generators: list[ShardedTensor] = []
    is_same_layout = document["layout"] == describe_layout(config, groups, kind)
    if is_same_layout and not is_new_run and not config.checkpoint.no_load_rng:
        generators = random_tensors(kind, groups)
    index = on_first_rank(lambda: read_index(folder))
    reader = StepReader(folder, document, index)
    _check_contents(reader, [*weights, *generators], partial(_may_be_left, config, is_new_run=is_new_run))
    on_every_rank(lambda: _read_tensors(reader, [*weights, *generators]))
    if generators:
        restore_random_states({tensor.key.removeprefix(RANDOM_PREFIX): tensor.data[0] for tensor in generators})
    elif not is_same_layout and not is_new_run and _has_dropout(config.model):
        LOGGER.warning("%s: was saved at another layout; dropout goes on from --seed", folder)
    if with_moments:
        _restore_optimizer(optimizer, document["optimizer"])
    return TrainState() if is_new_run else restore_state(document["train"])


def _has_dropout(model: ModelConfig) -> bool:
    return max(model.hidden_dropout, model.attention_dropout, model.generator_dropout) > 0.0


def _restore_optimizer(optimizer: MegatronOptimizer, saved: Mapping[str, Any]) -> None:
    set_num_updates(optimizer, saved["num_updates"])
    scaler = getattr(optimizer, "grad_scaler", None)
    if scaler and saved["grad_scaler"]:
        numbers = saved["grad_scaler"]
        counters = {name: int(value) for name, value in numbers.items() if name != "scale"}
        scaler.load_state_dict({"scale": torch.tensor([numbers["scale"]], dtype=torch.float32), **counters})


def _may_be_left(config: RunConfig, key: str, *, is_new_run: bool) -> bool:
    """Whether a weight of the step may have no place in this model.

    A new run takes what it finds. SPACTOR's second stage drops what only its first one trains.
    """
    is_second_stage = config.objective.objective == "spactor" and not config.model.has_generator
    return is_new_run or (is_second_stage and key.startswith(_FIRST_STAGE_WEIGHTS))


def _check_contents(reader: StepReader, wanted: Sequence[ShardedTensor], may_be_left: Callable[[str], bool]) -> None:
    """Compare names and shapes with what the step holds, on all ranks together, before anything is changed."""
    answers = gather_on_all((_find_mismatch(reader, wanted), {tensor.key for tensor in wanted}))
    problem = next((text for text, _ in answers if text), None)
    left = set(reader.weight_names()).difference(*(keys for _, keys in answers))
    left = {key for key in left if not may_be_left(key)}
    if problem is None and left:
        problem = f"holds {min(left)} ({len(left)} such tensors), which this model has not"
    if problem is not None:
        raise CheckpointError(f"{reader.folder}: {problem}; use the configuration it was saved with, or another step")


def _find_mismatch(reader: StepReader, wanted: Sequence[ShardedTensor]) -> str | None:
    found = {name: reader.shape(name) for name in reader.names()}
    for tensor in wanted:
        if tensor.key not in found:
            return f"holds no {tensor.key}"
        if found[tensor.key] != tuple(tensor.global_shape):
            return f"holds {tensor.key} of shape {found[tensor.key]}, this run has {tensor.global_shape}"
    return None


def _read_tensors(reader: StepReader, tensors: Sequence[ShardedTensor]) -> None:
    for tensor in tensors:
        reader.read_box(tensor.key, tensor.global_offset, tensor.data)
