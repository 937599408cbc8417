"""Save and load a run through megatron-core's dist_checkpointing, in Megatron's folders.

`<save>/iter_0000010/` holds core's torch_dist files (tensors only: those of `model_space.py`, and one row per rank of
random generator states) and `state.json` (counters, layout, configuration, versions); no object of ours is pickled.
How a step becomes visible is in `checkpoint_folder.py`. Both functions are collective, and an error on one rank is
raised on every rank.
"""

import dataclasses
import pickle
import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
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

from megatron_metro.config.errors import CheckpointError, MetroError, StorageError
from megatron_metro.config.schema import RunConfig
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.training.checkpoint_folder import (
    STATE_VERSION,
    find_step,
    first_line,
    prepare_step,
    publish,
    read_document,
    step_folder,
)
from megatron_metro.training.model_space import (
    OPTIMIZER_PREFIX,
    get_num_updates,
    set_num_updates,
    tensors_to_load,
    tensors_to_save,
)
from megatron_metro.training.random_state import read_random_states, restore_random_states
from megatron_metro.training.state import TrainState

_RANDOM_PREFIX = "random."
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
T = TypeVar("T")


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
    _on_first_rank(lambda: prepare_step(final, temporary))
    tensors = [
        *tensors_to_save(chunks, optimizer, with_moments=with_moments),
        *_random_tensors(_device_kind(chunks), groups),
    ]
    try:
        dist_checkpointing.save(_numbered(tensors), str(temporary), sharded_strategy=InProcessSave())
    except (CheckpointException, CheckpointingException, OSError, RuntimeError) as error:
        _on_first_rank(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise StorageError(f"{temporary}: not saved ({first_line(error)}); earlier steps are intact") from error
    document = _describe(config, state, optimizer, groups, _device_kind(chunks))
    _on_first_rank(lambda: publish(temporary, final, document))
    return final


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
    folder = _on_first_rank(lambda: find_step(config.checkpoint))
    if folder is None:
        return None
    document: dict[str, Any] = _on_first_rank(lambda: read_document(folder))
    is_new_run = config.checkpoint.finetune
    with_moments = optimizer is not None and not is_new_run and not config.checkpoint.no_load_optim
    if with_moments and not document["optimizer"]["has_moments"]:
        raise CheckpointError(f"{folder}: was saved without optimizer state; add --no-load-optim or --finetune")
    weights = tensors_to_load(chunks, optimizer, with_moments=with_moments)
    kind = _device_kind(chunks)
    random_tensors = []
    if not is_new_run and document["layout"] == _layout(config, groups, kind):
        random_tensors = _random_tensors(kind, groups)
    _check_contents(folder, [*weights, *random_tensors], partial(_may_be_left, config))
    _read_tensors(folder, [*weights, *random_tensors])
    if random_tensors:
        restore_random_states({tensor.key.removeprefix(_RANDOM_PREFIX): tensor.data[0] for tensor in random_tensors})
    if with_moments:
        _restore_optimizer(optimizer, document["optimizer"])
    return TrainState() if is_new_run else TrainState(**document["train"])


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
        "layout": _layout(config, groups, kind),
        "config": dataclasses.asdict(config),
        "versions": {"torch": torch.__version__, "megatron-core": version("megatron-core")},
    }


def _layout(config: RunConfig, groups: ParallelGroups, kind: str) -> dict[str, Any]:
    """What must be equal for each rank to hold the same layers and samples as the rank that saved."""
    return {
        "device": kind,
        "tensor": groups.tp_size,
        "pipeline": groups.pp_size,
        "virtual": config.parallel.num_virtual_stages_per_pipeline_rank,
        "pieces": config.parallel.pipeline_model_parallel_layout,
        "data": groups.dp_size,
    }


def _restore_optimizer(optimizer: MegatronOptimizer, saved: dict[str, Any]) -> None:
    set_num_updates(optimizer, saved["num_updates"])
    scaler = getattr(optimizer, "grad_scaler", None)
    if scaler and saved["grad_scaler"]:
        numbers = saved["grad_scaler"]
        counters = {name: int(value) for name, value in numbers.items() if name != "scale"}
        scaler.load_state_dict({"scale": torch.tensor([numbers["scale"]], dtype=torch.float32), **counters})


def _random_tensors(kind: str, groups: ParallelGroups) -> list[ShardedTensor]:
    """This rank's row of each generator's state."""
    return [
        ShardedTensor(
            key=_RANDOM_PREFIX + name,
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
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (problem, {tensor.key for tensor in wanted}))
    problem = next((text for text, _ in answers if text), None)
    left = {key for key in found if not key.startswith((OPTIMIZER_PREFIX, _RANDOM_PREFIX))}
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
            dist_checkpointing.load(_numbered(tensors), str(folder), validate_access_integrity=False)
    except _READ_ERRORS as error:
        raise CheckpointError(f"{folder}: cannot be read ({first_line(error)}); choose another step") from error


def _numbered(tensors: Sequence[ShardedTensor]) -> dict[str, ShardedTensor]:
    return {str(index): tensor for index, tensor in enumerate(tensors)}


def _device_kind(chunks: Sequence[nn.Module]) -> str:
    return next(chunks[0].parameters()).device.type


def _on_first_rank(function: Callable[[], T]) -> T:
    """The result of `function` on rank 0, on every rank; so is its error."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except MetroError as error:
            answer[1] = error
        except OSError as error:
            answer[1] = StorageError(first_line(error))
        except Exception as error:  # noqa: BLE001 (a fault of ours; the other ranks must not wait for it)
            answer[1] = RuntimeError(first_line(error))
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    result: T = answer[0]
    return result
