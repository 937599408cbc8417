"""`torch.save` archives read without torch.load: their entries, and what their records say of tensors.

An archive is a zip file of stored (never compressed) entries. `data.pkl` says how the bytes of `data/0`, `data/1` and
so on become tensors; it is read as plain records. What torch.load allows, even with weights_only, is more than that,
and any library of the process may add to it. A chunk of a step's tensor is an archive of exactly one of them.
"""

import io
import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_metro.checkpoint.records import PERSISTENT_ID, Global, Record, read_records, refuse_foreign
from megatron_metro.config.errors import CheckpointError, MetroError, first_line

_MAX_DIRECTORY_BYTES = _USUAL_DIRECTORY_BYTES = 1 << 16
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
TENSOR_GLOBALS = frozenset(
    [
        *(_REBUILD, _REBUILD_WITH_TYPE, "collections.OrderedDict", "torch.storage.UntypedStorage"),
        *_STORAGES,
        *_WITHOUT_STORAGE_CLASS,
    ]
)
# What a damaged or foreign archive makes Python's readers and torch raise.
DAMAGE = (
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    RuntimeError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRecord:
    """What a record says of a tensor: a box in one of the archive's storages. Sizes are not negative."""

    storage: str  # its numbers are the entry data/<storage>
    count: int  # numbers in the storage
    dtype: torch.dtype
    device: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    needs_grad: bool

    @property
    def is_contiguous(self) -> bool:
        """Whether the numbers lie in row-major order; the stride of a dimension of one element says nothing."""
        expected = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        is_same = all(s == 1 or found == wanted for s, found, wanted in zip(self.shape, self.strides, expected))
        return is_same or 0 in self.shape


def view_chunk(archive: memoryview, shape: tuple[int, ...], dtype: torch.dtype, path: Path) -> Tensor:
    """The numbers of a chunk as uint8 [*shape, bytes of one number], sharing the archive's memory.

    `archive` is the chunk's part of the file `path`, which is what errors name. Raises UnsafeError where the archive
    asks for anything but a tensor, CheckpointError where it is damaged or holds another tensor.
    """
    try:
        entries = find_entries(archive, _MAX_DIRECTORY_BYTES)
        root, description = read_description(entries, _MAX_RECORD_BYTES)
        found = read_tensor_record(read_records(description, path, TENSOR_GLOBALS))
        is_alone = (found.storage, found.offset, found.count) == ("0", 0, math.prod(shape)) and found.device == "cpu"
        if not is_alone or found.needs_grad or not found.is_contiguous:
            raise ValueError("its tensor is more than a box of numbers")
        data = entries[root + "data/0"]
        if (found.shape, found.dtype) != (shape, dtype) or len(data) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"holds {found.dtype} {list(found.shape)} in {len(data)} bytes, not {dtype} {list(shape)}")
    except MetroError:
        raise
    except DAMAGE as error:
        # A bare pickle, as torch wrote before zip, is told from a damaged archive.
        refuse_foreign(bytes(archive[:_MAX_RECORD_BYTES]), path, TENSOR_GLOBALS)
        raise CheckpointError(f"{path}: is damaged ({first_line(error)[:300]}); choose another step") from error
    if not len(data):
        return torch.empty(*shape, dtype.itemsize, dtype=torch.uint8)
    return torch.frombuffer(data, dtype=torch.uint8).view(*shape, dtype.itemsize)


def read_description(entries: dict[str, memoryview], max_bytes: int) -> tuple[str, bytes]:
    """The folder inside an archive and its `data.pkl`. Raises ValueError or LookupError."""
    (record_name,) = (name for name in entries if name.endswith("/data.pkl"))
    root = record_name.removesuffix("data.pkl")
    if len(entries[record_name]) > max_bytes:
        raise ValueError(f"describes its tensors in more than {max_bytes} bytes")
    byteorder = entries.get(root + "byteorder", memoryview(b"little"))  # which torch before 2.1 did not write
    if bytes(byteorder) != b"little":
        raise ValueError("is no archive from a little-endian machine")
    return root, bytes(entries[record_name])


def find_entries(archive: memoryview, max_directory_bytes: int) -> dict[str, memoryview]:
    """The entries of a zip file by name; all are stored as they are, lie inside it and have different names.

    Raises ValueError or zipfile.BadZipFile, also where the directory at its end is larger than `max_directory_bytes`.
    """
    tail_size, found = _read_directory(archive, max_directory_bytes)
    entries: dict[str, memoryview] = {}
    for entry in found:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise ValueError(f"{entry.filename[:100]!a} is compressed or encrypted")
        if entry.filename in entries:
            raise ValueError(f"{entry.filename[:100]!a} is in it twice")
        begin = entry.header_offset + len(archive) - tail_size
        if begin < 0:
            raise ValueError(f"{entry.filename[:100]!a} begins before the archive")
        signature, *lengths = _LOCAL_HEADER.unpack(archive[begin : begin + _LOCAL_HEADER.size])
        start = begin + _LOCAL_HEADER.size + sum(lengths)
        if signature != b"PK\x03\x04" or start + entry.file_size > len(archive):
            raise ValueError(f"{entry.filename[:100]!a} does not lie inside the archive")
        entries[entry.filename] = archive[start : start + entry.file_size]
    return entries


def _read_directory(archive: memoryview, max_bytes: int) -> tuple[int, list[zipfile.ZipInfo]]:
    """The directory at the end of a zip file, and how much of the file it was read from; small ones cost little."""
    size = min(_USUAL_DIRECTORY_BYTES, max_bytes)
    while True:
        tail = bytes(archive[-size:])
        try:
            with zipfile.ZipFile(io.BytesIO(tail)) as directory:
                return len(tail), directory.infolist()
        except (zipfile.BadZipFile, ValueError):
            if size >= min(max_bytes, len(archive)):
                raise
            size = min(size * 16, max_bytes)


def read_tensor_record(value: Any) -> TensorRecord:
    """What a record that builds a tensor says; ValueError or TypeError for any other record."""
    if type(value) is not Record or value.name not in (_REBUILD, _REBUILD_WITH_TYPE):
        raise ValueError("holds something else than a tensor")
    storage, offset, shape, strides, needs_grad, hooks, *rest = value.arguments
    if type(storage) is not Record or storage.name != PERSISTENT_ID:
        raise ValueError("its tensor has no storage")
    ((kind, storage_class, key, device, count),) = storage.arguments
    if type(storage_class) is not Global or kind != "storage" or type(key) is not str or type(device) is not str:
        raise ValueError("its tensor has a storage of another kind")
    if value.name == _REBUILD_WITH_TYPE:
        (dtype_name,) = rest
        dtype = _WITHOUT_STORAGE_CLASS[dtype_name.name]  # of one byte, so the untyped storage counts numbers too
    else:
        dtype = _STORAGES[storage_class.name]
        if rest:
            raise ValueError("its tensor carries more than numbers")
    is_plain = type(hooks) is Record and hooks.arguments == () and hooks.state is None and not hooks.items
    numbers_are_whole = all(type(size) is int and size >= 0 for size in (offset, count, *shape, *strides))
    if not is_plain or type(needs_grad) is not bool or not numbers_are_whole or len(shape) != len(strides):
        raise ValueError("its tensor is more than a box of numbers")
    return TensorRecord(
        storage=key,
        count=count,
        dtype=dtype,
        device=device,
        offset=offset,
        shape=shape,
        strides=strides,
        needs_grad=needs_grad,
    )
