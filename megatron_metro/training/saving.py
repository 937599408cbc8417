"""Save a run through megatron-core's dist_checkpointing, in Megatron's folders.

`<save>/iter_0000010/` holds core's torch_dist files (tensors only: those of `model_space.py`, and one row per rank of
random generator states) and `state.json` (counters, layout, configuration, versions); no object of ours is pickled.
How a step becomes visible is in `checkpoint/folder.py`. Saving is collective; an error on one rank is raised on all.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint import save as save_tensors

from megatron_metro.checkpoint.folder import STATE_VERSION, prepare_step, publish, step_folder
from megatron_metro.config.errors import StorageError, first_line
from megatron_metro.config.schema import RunConfig
from megatron_metro.parallel.agreement import on_first_rank
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.training.model_space import device_kind, get_num_updates, number, tensors_to_save
from megatron_metro.training.random_state import random_tensors
from megatron_metro.training.state import TrainState, describe_layout


def save_checkpoint(
    config: RunConfig,
    state: TrainState,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer,
    groups: ParallelGroups,
) -> Path:
    """Write the step `state.iteration` below --save and announce it; returns its folder.

    Raises CheckpointError when the step exists already, StorageError when the file system refuses a write; in both
    cases what was saved before stays as it was.
    """
    assert config.checkpoint.save is not None
    folder = Path(config.checkpoint.save)
    final = step_folder(folder, state.iteration)
    temporary = final.with_name(f"{final.name}.partial")
    with_moments = not config.checkpoint.no_save_optim
    on_first_rank(lambda: prepare_step(final, temporary))
    tensors = [
        *tensors_to_save(chunks, optimizer, with_moments=with_moments),
        *random_tensors(device_kind(chunks), groups),
    ]
    try:
        dist_checkpointing.save(number(tensors), str(temporary), sharded_strategy=InProcessSave())
    except (CheckpointException, CheckpointingException, OSError, RuntimeError) as error:
        on_first_rank(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise StorageError(f"{temporary}: not saved ({first_line(error)}); earlier steps are intact") from error
    document = _describe(config, state, optimizer, groups, device_kind(chunks))
    on_first_rank(lambda: publish(temporary, final, document))
    return final


class InProcessSave(SaveShardedStrategy):
    """Core's torch_dist format, written by this process.

    Core's own writer forks a process per file and spawns another to collect their answers: seconds per save, a
    re-import of the main module, and a hang when one of them dies. A synchronous save gains nothing from them.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    @property
    def can_handle_sharded_objects(self) -> bool:
        """No: a sharded object is a pickle, and none is written."""
        return False

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Write this rank's main replicas; collective."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        save_tensors(
            mcore_to_pyt_state_dict(by_key, is_loading=False),
            storage_writer=FileSystemWriter(checkpoint_dir, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def _describe(
    config: RunConfig, state: TrainState, optimizer: MegatronOptimizer, groups: ParallelGroups, kind: str
) -> dict[str, Any]:
    scaler = getattr(optimizer, "grad_scaler", None)
    scaler_state = scaler.state_dict() if scaler else {}
    return {
        "version": STATE_VERSION,
        "train": dataclasses.asdict(state),
        "optimizer": {
            "has_moments": not config.checkpoint.no_save_optim,
            "num_updates": get_num_updates(optimizer),
            "grad_scaler": {name: float(value) for name, value in scaler_state.items()},
        },
        "layout": describe_layout(config, groups, kind),
        "config": dataclasses.asdict(config),
        "versions": {"torch": torch.__version__, "megatron-core": version("megatron-core")},
    }
