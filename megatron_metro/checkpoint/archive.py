"""One chunk of a tensor: a `torch.save` archive inside a file of a step, read without torch.load.

The archive is a zip file of stored (never compressed) entries. `data.pkl` says how the bytes of `data/0` become a
tensor; it is read as plain records and must describe one contiguous tensor and nothing else. What torch.load allows,
even with weights_only, is more than that, and any library of the process may add to it.
"""

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_metro.checkpoint.records import PERSISTENT_ID, Global, Record, read_records, refuse_foreign
from megatron_metro.config.errors import CheckpointError, MetroError, first_line

_MAX_DIRECTORY_BYTES = 1 << 16
_MAX_RECORD_BYTES = 1 << 16
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field behind it
_REBUILD = "torch._utils._rebuild_tensor_v2"
_REBUILD_WITH_TYPE = "torch._utils._rebuild_tensor_v3"  # for types of numbers that have no storage class of their own
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_WITHOUT_STORAGE_CLASS = {str(kind): kind for kind in (torch.float8_e4m3fn, torch.float8_e5m2)}
_EXPECTED = frozenset(
    [
        *(_REBUILD, _REBUILD_WITH_TYPE, "collections.OrderedDict", "torch.storage.UntypedStorage"),
        *_STORAGES,
        *_WITHOUT_STORAGE_CLASS,
    ]
)


def view_chunk(archive: memoryview, shape: tuple[int, ...], dtype: torch.dtype, path: Path) -> Tensor:
    """The numbers of a chunk as uint8 [*shape, bytes of one number], sharing the archive's memory.

    `archive` is the chunk's part of the file `path`, which is what errors name. Raises UnsafeError where the archive
    asks for anything but a tensor, CheckpointError where it is damaged or holds another tensor.
    """
    try:
        entries = _find_entries(archive)
        (record_name,) = (name for name in entries if name.endswith("/data.pkl"))
        root = record_name.removesuffix("data.pkl")
        description = bytes(entries[record_name])
        if len(description) > _MAX_RECORD_BYTES or bytes(entries[root + "byteorder"]) != b"little":
            raise ValueError("is no archive of one tensor from a little-endian machine")
        found = _read_tensor(read_records(description, path, _EXPECTED))
        data = entries[root + "data/0"]
        if found != (shape, dtype) or len(data) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"holds {found[1]} {list(found[0])} in {len(data)} bytes, not {dtype} {list(shape)}")
    except MetroError:
        raise
    except (
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        RuntimeError,
        OSError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        refuse_foreign(bytes(archive[:_MAX_RECORD_BYTES]), path, _EXPECTED)  # a bare pickle, as torch wrote before zip
        raise CheckpointError(f"{path}: is damaged ({first_line(error)[:300]}); choose another step") from error
    if not len(data):
        return torch.empty(*shape, dtype.itemsize, dtype=torch.uint8)
    return torch.frombuffer(data, dtype=torch.uint8).view(*shape, dtype.itemsize)


def _find_entries(archive: memoryview) -> dict[str, memoryview]:
    """The entries of a zip file by name; all are stored as they are, lie inside it and have different names."""
    tail = bytes(archive[-_MAX_DIRECTORY_BYTES:])
    with zipfile.ZipFile(io.BytesIO(tail)) as directory:  # which needs no more than the directory at the end
        found = directory.infolist()
    entries: dict[str, memoryview] = {}
    for entry in found:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise ValueError(f"{entry.filename[:100]!a} is compressed or encrypted")
        if entry.filename in entries:
            raise ValueError(f"{entry.filename[:100]!a} is in it twice")
        begin = entry.header_offset + len(archive) - len(tail)
        if begin < 0:
            raise ValueError(f"{entry.filename[:100]!a} begins before the archive")
        signature, *lengths = _LOCAL_HEADER.unpack(archive[begin : begin + _LOCAL_HEADER.size])
        start = begin + _LOCAL_HEADER.size + sum(lengths)
        if signature != b"PK\x03\x04" or start + entry.file_size > len(archive):
            raise ValueError(f"{entry.filename[:100]!a} does not lie inside the archive")
        entries[entry.filename] = archive[start : start + entry.file_size]
    return entries


def _read_tensor(value: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a record that builds one contiguous tensor from all of `data/0`."""
    if type(value) is not Record or value.name not in (_REBUILD, _REBUILD_WITH_TYPE):
        raise ValueError("holds something else than a tensor")
    storage, offset, shape, strides, needs_grad, hooks, *rest = value.arguments
    if type(storage) is not Record or storage.name != PERSISTENT_ID:
        raise ValueError("its tensor has no storage")
    ((kind, storage_class, key, device, count),) = storage.arguments
    if type(storage_class) is not Global or (kind, key, device) != ("storage", "0", "cpu"):
        raise ValueError("its tensor has a storage of another kind")
    if value.name == _REBUILD_WITH_TYPE:
        (dtype_name,) = rest
        dtype = _WITHOUT_STORAGE_CLASS[dtype_name.name]  # of one byte, so the untyped storage counts numbers too
    else:
        dtype = _STORAGES[storage_class.name]
        if rest:
            raise ValueError("its tensor carries more than numbers")
    is_plain = type(hooks) is Record and hooks.arguments == () and hooks.state is None
    numbers_are_whole = all(type(size) is int and size >= 0 for size in (offset, count, *shape, *strides))
    if not is_plain or needs_grad is not False or not numbers_are_whole or offset != 0:
        raise ValueError("its tensor is more than a box of numbers")
    if count != math.prod(shape) or not _is_contiguous(shape, strides):
        raise ValueError("its tensor is not contiguous")
    return shape, dtype


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the numbers lie in row-major order; the stride of a dimension of one element says nothing."""
    expected = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    is_same = all(size == 1 or found == wanted for size, found, wanted in zip(shape, strides, expected))
    return len(strides) == len(shape) and (is_same or 0 in shape)
