"""The tensors of a step, read by any process on its own: whole, or a box of one; no torch.distributed, no pickle.

One reader serves training at any layout, conversion and tools, so that there is one place to trust. Nothing of a step
is kept in memory but its index; a chunk is mapped while it is copied.
"""

import mmap
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_metro.checkpoint.archive import view_chunk
from megatron_metro.checkpoint.folder import read_document
from megatron_metro.checkpoint.manifest import verify_step
from megatron_metro.checkpoint.tensor_index import Chunk, StoredTensor, read_index
from megatron_metro.config.errors import CheckpointError, first_line

OPTIMIZER_PREFIX = "optimizer.state."
RANDOM_PREFIX = "random."


class StepReader:
    """An opened step; `document` is what it says of the run."""

    def __init__(self, folder: Path, document: Mapping[str, Any], index: dict[str, StoredTensor]) -> None:
        self.folder = folder
        self.document = document
        self._index = index

    def names(self) -> tuple[str, ...]:
        """All tensors, sorted."""
        return tuple(self._index)

    def weight_names(self) -> tuple[str, ...]:
        """Those of the model alone, without optimizer state and random generators."""
        return tuple(name for name in self._index if not name.startswith((OPTIMIZER_PREFIX, RANDOM_PREFIX)))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor. Raises CheckpointError where the step has none of this name, as all methods do."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._find(name).dtype

    def read(self, name: str) -> Tensor:
        """A whole tensor in new memory, on the CPU, as stored."""
        stored = self._find(name)
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        self.read_box(name, (0,) * len(stored.shape), tensor)
        return tensor

    def read_box(self, name: str, offset: Sequence[int], out: Tensor) -> None:
        """Fill `out`, of any type and device, with the box of its shape that begins at `offset`.

        Raises CheckpointError where the box leaves the tensor or a file is damaged, UnsafeError where a file asks for
        anything that would run code.
        """
        stored = self._find(name)
        ends = [start + size for start, size in zip(offset, out.shape)]
        if not len(offset) == out.dim() == len(stored.shape) or any(
            start < 0 or end > bound for start, end, bound in zip(offset, ends, stored.shape)
        ):
            raise CheckpointError(
                f"{self.folder}: {name} of shape {stored.shape} has no box of {tuple(out.shape)} at {tuple(offset)}"
            )
        for chunk in stored.chunks:
            first = [max(pair) for pair in zip(offset, chunk.offset)]
            last = [min(end, at + size) for end, at, size in zip(ends, chunk.offset, chunk.shape)]
            if any(start >= end for start, end in zip(first, last)):
                continue
            inside_chunk = [slice(a - at, b - at) for a, b, at in zip(first, last, chunk.offset)]
            inside_out = [slice(a - at, b - at) for a, b, at in zip(first, last, offset)]
            self._copy(stored, chunk, tuple(inside_chunk), out[tuple(inside_out)])

    def _copy(self, stored: StoredTensor, chunk: Chunk, part: tuple[slice, ...], out: Tensor) -> None:
        path = self.folder / chunk.file
        with torch.no_grad():
            numbers = view_chunk(_map(path, chunk), chunk.shape, stored.dtype, path)[part]
            # In fresh memory: the bytes in the file keep to no alignment.
            out.copy_(numbers.clone(memory_format=torch.contiguous_format).view(stored.dtype).squeeze(-1))

    def _find(self, name: str) -> StoredTensor:
        if name not in self._index:
            raise CheckpointError(f"{self.folder}: holds no {name}; use the configuration it was saved with")
        return self._index[name]


def open_step(folder: Path, verify: bool = True) -> StepReader:
    """Open a step's folder; with `verify`, every byte of it is compared with its manifest first.

    Raises CheckpointError, naming the file, or UnsafeError, naming the file and what it asks for.
    """
    if verify:
        verify_step(folder)
    return StepReader(folder, read_document(folder), read_index(folder))


def _map(path: Path, chunk: Chunk) -> memoryview:
    """The bytes of a chunk, in memory as they are looked at, for as long as the view lives."""
    page_start = chunk.start - chunk.start % mmap.ALLOCATIONGRANULARITY
    length = chunk.start - page_start + chunk.num_bytes
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size < page_start + length:
                raise CheckpointError(f"{path}: is shorter than it was, or no regular file; choose another step")
            # Private and writable in memory: torch shares no memory that it may not write.
            mapped = mmap.mmap(descriptor, length, access=mmap.ACCESS_COPY, offset=page_start)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read ({first_line(error)}); choose another step") from error
    return memoryview(mapped)[chunk.start - page_start :]
