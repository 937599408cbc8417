"""Weights that no run of ours has saved, written as a step that runs start from: Megatron's `release`. One process.

Tensors are written as they come, so that one at a time is in memory.
"""

import io
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_metro.checkpoint.folder import (
    RELEASE,
    STATE_VERSION,
    TRACKER,
    discard,
    list_iterations,
    prepare_step,
    publish,
)
from megatron_metro.checkpoint.reader import StepReader
from megatron_metro.checkpoint.tensor_index import read_index
from megatron_metro.checkpoint.writer import WrittenFile, write_tensors
from megatron_metro.config.errors import CheckpointError
from megatron_metro.config.files import refusing_writes, write_atomically

_DATA_FILE = "__0_0.distcp"


def check_release_folder(folder: Path) -> None:
    """Raise CheckpointError where a folder holds something that a release would stand beside."""
    taken = [folder / RELEASE, folder / TRACKER]
    if list_iterations(folder) or any(path.exists() for path in taken) or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder}: holds a checkpoint already and is never overwritten; name another folder")


def write_release(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    describe: Mapping[str, Any],
    check: Callable[[StepReader], None],
    beside: Mapping[str, bytes],
) -> Path:
    """Write `release` into a folder of checkpoints and return its path.

    `describe` is what the step says of the run it stands for: `config`, `versions`, `identity`. `check` is called with
    what was written, read back, before anything has its final name; where it raises, nothing is left. `beside` are
    small files for `folder` itself.

    Raises CheckpointError where the folder is in use, StorageError where the file system refuses.
    """
    check_release_folder(folder)
    final = folder / RELEASE
    with refusing_writes(final):
        temporary = prepare_step(final)
        try:
            items: list[tuple[str, tuple[int, ...], torch.dtype]] = []
            written = write_tensors(temporary / _DATA_FILE, _note(tensors, items))
            _write_description(temporary, items, written)
            check(StepReader(temporary, {}, read_index(temporary)))
            for name, content in beside.items():
                write_atomically(folder / name, content)
            publish(temporary, final, _complete(describe), {_DATA_FILE: written.record})
        except BaseException:
            discard(temporary)
            for name in beside:
                (folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # it holds something
                folder.rmdir()
            raise
    return final


def _note(
    tensors: Iterable[tuple[str, Tensor]], items: list[tuple[str, tuple[int, ...], torch.dtype]]
) -> Iterable[Tensor]:
    for name, tensor in tensors:
        items.append((name, tuple(tensor.shape), tensor.dtype))
        yield tensor


def _write_description(
    folder: Path, items: Iterable[tuple[str, tuple[int, ...], torch.dtype]], written: WrittenFile
) -> None:
    """Torch's and core's other files: every tensor is one chunk."""
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    results = []
    for (name, shape, dtype), (start, length) in zip(items, written.spans, strict=True):
        offset = torch.Size([0] * len(shape))
        chunk = ChunkStorageMetadata(offsets=offset, sizes=torch.Size(shape))
        described[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [chunk])
        place = _StorageInfo(_DATA_FILE, start, length)
        results.append(WriteResult(index=MetadataIndex(name, offset, 0), size_in_bytes=length, storage_data=place))
    FileSystemWriter(folder, sync_files=True).finish(Metadata(described), [results])
    common = io.BytesIO()
    torch.save({}, common)
    (folder / COMMON_STATE_FNAME).write_bytes(common.getvalue())
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def _complete(describe: Mapping[str, Any]) -> dict[str, Any]:
    """A step's document: nothing was trained, and there is no optimizer state."""
    return {
        "version": STATE_VERSION,
        "train": {"iteration": 0},
        "optimizer": {"has_moments": False, "num_updates": 0, "grad_scaler": {}},
        "layout": None,
        **describe,
    }
