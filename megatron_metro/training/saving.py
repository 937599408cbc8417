"""Save a run in megatron-core's torch_dist format and Megatron's folders; collective.

`<save>/iter_0000010/` holds core's files (tensors only: those of `model_space.py`, and one row per rank of random
generator states) and `manifest.json` (counters, layout, configuration, versions; size and SHA-256 of every file); no
object of ours is pickled. Core and torch plan who writes what; every rank then writes its own file, itself or through a
process of its own, and the first one publishes the step (`checkpoint/folder.py`). An error on one rank is raised on
all, and leaves what was saved before as it was.

Core's own writers are not used: they fork a process per file and spawn another to collect the answers, re-import the
main module, and hang when one of them dies.
"""

import dataclasses
import io
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    CheckpointException,
    FileSystemWriter,
    Metadata,
    SavePlan,
    SavePlanner,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint import save as plan_together
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_metro.checkpoint.folder import (
    STATE_VERSION,
    delete_step,
    discard,
    list_expendable,
    prepare_step,
    publish,
    step_folder,
)
from megatron_metro.checkpoint.writer import WriterProcess, WrittenFile, to_host, write_tensors
from megatron_metro.config.errors import MetroError, StorageError, first_line
from megatron_metro.config.schema import RunConfig
from megatron_metro.parallel.agreement import gather_on_all, gather_on_first, on_every_rank, on_first_rank
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.training.model_space import device_kind, get_num_updates, number, tensors_to_save
from megatron_metro.training.random_state import random_tensors
from megatron_metro.training.state import TrainState, describe_layout
from megatron_metro.training.verification import verify_on_all


class Saver:
    """The saves of a run: at once or, with --async-save, in the background, one at a time.

    `announce` is called with the iteration once a step can be resumed from. All methods are collective; they raise
    CheckpointError when the step exists already, StorageError when the file system or a writer fails.
    """

    def __init__(
        self, config: RunConfig, groups: ParallelGroups, identity: Mapping[str, Any], announce: Callable[[int], None]
    ) -> None:
        self._config, self._groups, self._identity, self._announce = config, groups, identity, announce
        self._pending: _Step | None = None

    def save(self, state: TrainState, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer) -> None:
        """Save the step `state.iteration`; in the background from copies in host memory."""
        self.wait()
        if not self._config.checkpoint.async_save:
            save_checkpoint(self._config, state, chunks, optimizer, self._groups, self._identity)
            self._announce(state.iteration)
            return
        step = _plan_step(self._config, state, chunks, optimizer, self._groups, self._identity)
        with step.or_nothing():
            on_every_rank(step.start_writer)
        self._pending = step

    def poll(self) -> None:
        """Publish the step that is under way once all ranks have written theirs; call after every training step.

        A writer that has died, on any rank, is noticed here.
        """
        self._look(is_patient=False)

    def wait(self) -> None:
        """Block until no step is under way, as long as --async-save-timeout allows; call before a run ends."""
        self._look(is_patient=True)

    def _look(self, *, is_patient: bool) -> None:
        if (step := self._pending) is None:
            return
        self._pending = None
        with step.or_nothing():
            is_written = all(gather_on_all(on_every_rank(lambda: step.look(is_patient=is_patient))))
        if not is_written:
            self._pending = step
            return
        step.publish()
        self._announce(step.iteration)


def save_checkpoint(
    config: RunConfig,
    state: TrainState,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer,
    groups: ParallelGroups,
    identity: Mapping[str, Any] | None = None,
) -> Path:
    """Write the step `state.iteration` below --save in this process and publish it; returns its folder.

    `identity` says which text and tokenizer the run has (`describe_identity`); without it no run can go on from here.
    Raises CheckpointError when the step exists already, StorageError when the file system refuses a write.
    """
    step = _plan_step(config, state, chunks, optimizer, groups, identity)
    with step.or_nothing():
        on_every_rank(step.write)
    step.publish()
    return step.final


def _plan_step(
    config: RunConfig,
    state: TrainState,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer,
    groups: ParallelGroups,
    identity: Mapping[str, Any] | None,
) -> "_Step":
    kind = device_kind(chunks)
    step = _Step(config, state.iteration, {**_describe(config, state, optimizer, groups, kind), "identity": identity})
    with step.or_nothing():
        with_moments = not config.checkpoint.no_save_optim
        tensors = tensors_to_save(chunks, optimizer, with_moments=with_moments)
        step.plan([*tensors, *random_tensors(kind, groups)])
    return step


class _Step:
    """A step on its way to the disk: what this rank writes of it and, on the first rank, what describes it.

    Methods that end in an agreement of all ranks say so; the others are called within one.
    """

    def __init__(self, config: RunConfig, iteration: int, document: dict[str, Any]) -> None:
        assert config.checkpoint.save is not None
        self.config, self.iteration, self.document = config, iteration, document
        self.final = step_folder(Path(config.checkpoint.save), iteration)
        self._temporary = on_first_rank(lambda: prepare_step(self.final))
        self._plan = _Plan(self._temporary)
        self._tensors: list[Tensor] = []
        self._writer: WriterProcess | None = None
        self._written: WrittenFile | None = None

    @contextmanager
    def or_nothing(self) -> Iterator[None]:
        """When the body raises on all ranks: end the writers, remove what is written, say what there was room for."""
        try:
            yield
        except (MetroError, CheckpointException, RuntimeError) as error:
            if self._writer is not None:
                self._writer.close()
            cause = str(error) if isinstance(error, MetroError) else first_line(error)
            room = on_first_rank(self._give_up)
            if not isinstance(error, StorageError | CheckpointException):
                raise
            raise StorageError(f"{self.final}: not saved ({cause}; {room}); earlier steps are intact") from error

    def plan(self, tensors: Sequence[ShardedTensor]) -> None:
        """Agree on who writes what."""
        mine: dict[str, Any] = {}
        # Core's check that every element is written once raises on the first rank only.
        on_every_rank(lambda: mine.update(save_preprocess(number(tensors))[0]))
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(mine, keep_only_main_replica=True)
        plan_together(
            mcore_to_pyt_state_dict(by_key, is_loading=False),
            storage_writer=self._plan,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
        self._tensors = self._plan.take_tensors()

    def write(self) -> None:
        """Write this rank's file here and now. Raises OSError."""
        if self._tensors:
            self._written = write_tensors(self._plan.file, self._tensors)
        self._tensors = []

    def start_writer(self) -> None:
        """Copy this rank's tensors to host memory, and have them written from there. Raises StorageError."""
        if self._tensors:
            copies = [to_host(tensor, copy=True) for tensor in self._tensors]
            self._writer = WriterProcess(self._plan.file, copies, self.config.checkpoint.async_save_timeout)
        self._tensors = []

    def look(self, *, is_patient: bool) -> bool:
        """Whether this rank's file is written. Raises StorageError when its writer has failed."""
        if self._writer is not None and self._written is None:
            self._written = self._writer.wait() if is_patient else self._writer.poll()
        return self._writer is None or self._written is not None

    def publish(self) -> None:
        """Agree on what was written, publish it, and let go what is not to be retained once the step is verified."""
        with self.or_nothing():
            parts = gather_on_first((self._plan.file.name, self._written, self._plan.list_results(self._written)))
            on_first_rank(lambda: self._publish(parts))
        expendable = on_first_rank(lambda: list_expendable(self.config.checkpoint, self.iteration))
        if expendable:
            verify_on_all(self.final)
            for former in expendable:
                on_first_rank(partial(delete_step, former))

    def _publish(self, parts: Sequence[tuple[str, WrittenFile | None, list[WriteResult]]]) -> None:
        self._plan.write_description([results for _, _, results in parts])
        known = {name: written.record for name, written, _ in parts if written is not None}
        publish(self._temporary, self.final, self.document, known)

    def _give_up(self) -> str:
        discard(self._temporary)
        free = shutil.disk_usage(self.final.parent).free
        return f"{self._plan.count_bytes() / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free"


class _Plan(FileSystemWriter):
    """What torch plans for this rank to write, and the description that its first rank adds.

    Torch would write in `write_data`; here nothing is written before all ranks know that they can.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=True)
        self._folder = folder
        self._items: list[tuple[MetadataIndex, Tensor]] = []
        self._metadata: Metadata | None = None  # on the first rank
        self.file = folder

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Torch's hook: this rank's part of the plan."""
        self.file = self._folder / f"{plan.storage_data.prefix}0.distcp"
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor), f"{item.index.fqn}: nothing but tensors is saved"
            self._items.append((item.index, tensor))
        nothing: Future[list[WriteResult]] = Future()
        nothing.set_result([])
        return nothing

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Torch's hook on the first rank: the description of all tensors, but for where they lie."""
        self._metadata = metadata

    def take_tensors(self) -> list[Tensor]:
        """What this rank writes, in order; the plan itself keeps only their names."""
        tensors = [tensor for _, tensor in self._items]
        self._items = [(index, torch.empty(0)) for index, _ in self._items]
        return tensors

    def list_results(self, written: WrittenFile | None) -> list[WriteResult]:
        """Where each tensor of this rank's file lies."""
        spans = () if written is None else written.spans
        return [
            WriteResult(index=index, size_in_bytes=length, storage_data=_StorageInfo(self.file.name, offset, length))
            for (index, _), (offset, length) in zip(self._items, spans, strict=True)
        ]

    def write_description(self, results: list[list[WriteResult]]) -> None:
        """Core's and torch's other files; on the first rank. Raises OSError."""
        assert self._metadata is not None
        super().finish(self._metadata, results)
        common = io.BytesIO()  # torch hides what the file system says
        torch.save({}, common)
        (self._folder / COMMON_STATE_FNAME).write_bytes(common.getvalue())
        save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))

    def count_bytes(self) -> int:
        """Size of all tensors of the step; on the first rank."""
        entries = self._metadata.state_dict_metadata.values() if self._metadata is not None else ()
        tensors = [entry for entry in entries if isinstance(entry, TensorStorageMetadata)]
        return sum(math.prod(tensor.size) * tensor.properties.dtype.itemsize for tensor in tensors)


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
