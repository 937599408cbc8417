"""Weights in one file of `torch.save`, such as pytorch_model.bin: a dictionary of tensors, read one tensor at a time.

As everywhere here nothing of the file is run. The file is mapped, so that a tensor takes memory when it is read.
"""

import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_metro.checkpoint.archive import (
    DAMAGE,
    TENSOR_GLOBALS,
    TensorRecord,
    find_entries,
    read_description,
    read_tensor_record,
)
from megatron_metro.checkpoint.records import Pairs, Record, read_records, refuse_foreign
from megatron_metro.config.errors import CheckpointError, MetroError, first_line

_MAX_DIRECTORY_BYTES = 1 << 26  # an entry takes some 70
_MAX_RECORD_BYTES = 1 << 26
_MAX_NESTING = 8
_PARAMETER = "torch._utils._rebuild_parameter"
_EXPECTED = TENSOR_GLOBALS | {_PARAMETER}
_ADVICE = "save its state dictionary with a newer torch.save, or as safetensors"


class StateFile:
    """The tensors of a file by dotted name; what else stands in its dictionaries is kept as plain values.

    Raises UnsafeError, naming the file and the global, where the file asks for anything that would run code, and
    CheckpointError where it is damaged, compressed or of a torch before 1.6.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _map(path)
        archive = memoryview(self._map)
        try:
            self._entries = find_entries(archive, _MAX_DIRECTORY_BYTES)
            self._root, description = read_description(self._entries, _MAX_RECORD_BYTES)
            self._tensors: dict[str, TensorRecord] = {}
            for name, value in _walk(read_records(description, path, _EXPECTED), "", 0):
                if name in self._tensors:
                    raise ValueError(f"holds {name[:200]!a} twice")
                self._tensors[name] = self._check(value)
        except MetroError:
            raise
        except DAMAGE as error:
            refuse_foreign(bytes(archive[:_MAX_RECORD_BYTES]), path, _EXPECTED)  # the format before zip archives
            raise CheckpointError(f"{path}: cannot be read ({first_line(error)[:300]}); {_ADVICE}") from error

    def names(self) -> tuple[str, ...]:
        """All tensors, in the order of the file."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of `names`."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """The tensor in new memory, contiguous."""
        found = self._tensors[name]
        data = self._entries[f"{self._root}data/{found.storage}"]
        if 0 in found.shape:
            return torch.empty(found.shape, dtype=found.dtype)
        # The file keeps to no alignment, so bytes are gathered before they are numbers.
        numbers = torch.frombuffer(data, dtype=torch.uint8).view(-1, found.dtype.itemsize)
        strides = [stride * found.dtype.itemsize for stride in found.strides]
        box = numbers.as_strided(
            (*found.shape, found.dtype.itemsize), (*strides, 1), found.offset * found.dtype.itemsize
        )
        tensor = box.clone(memory_format=torch.contiguous_format).view(found.dtype).squeeze(-1)
        self._map.madvise(mmap.MADV_DONTNEED)  # what was looked at need not stay in memory
        return tensor

    def _check(self, value: Record) -> TensorRecord:
        """What a record says, once it is sure that the numbers are in the file, each of them once."""
        found = read_tensor_record(value)
        data = self._entries[f"{self._root}data/{found.storage}"]
        last = found.offset + sum((size - 1) * stride for size, stride in zip(found.shape, found.strides))
        is_empty = 0 in found.shape
        if len(data) != found.count * found.dtype.itemsize or not (is_empty or last < found.count):
            raise ValueError(f"has a tensor of shape {list(found.shape)} beyond its {len(data)} bytes")
        if not is_empty and math.prod(found.shape) > found.count:
            raise ValueError(f"has a tensor of shape {list(found.shape)} in {found.count} numbers, some of them twice")
        return found


def _walk(value: Any, prefix: str, depth: int) -> Iterator[tuple[str, Record]]:
    """Dotted names and records of all tensors in nested dictionaries; other values, lists too, are passed over."""
    if depth > _MAX_NESTING:
        return
    if type(value) is Record and value.name == _PARAMETER:
        value = value.arguments[0]
    if type(value) is Record and value.name == "collections.OrderedDict":
        value = value.items
    if type(value) is Pairs:
        for key, item in value:
            if type(key) is str:
                yield from _walk(item, f"{prefix}.{key}" if prefix else key, depth + 1)
    elif type(value) is Record:
        yield prefix, value


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            # Private and writable in memory: torch shares no memory that it may not write.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({first_line(error)}); give a whole file") from error
