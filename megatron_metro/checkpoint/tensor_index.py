"""Which tensors a step holds and where their bytes lie: torch_dist's `.metadata`, read as untrusted text.

torch pickles this file and unpickles it without asking. Here it becomes plain records (`records.py`), then frozen
values, and everything that reading relies on is checked before a byte of a tensor is read: names, kinds, sizes, that
the chunks of a tensor cover it exactly once, that every chunk lies inside a file of the step and shares no byte with
another. So no tensor can be larger than the files that hold it.
"""

import math
import os
import random
import re
import stat
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from megatron_metro.checkpoint.records import Global, Pairs, Record, read_records
from megatron_metro.config.errors import CheckpointError, MetroError, UnsafeError, first_line

INDEX_FILE = ".metadata"
MAX_INDEX_BYTES = 1 << 26  # a chunk takes some 250
_DATA_FILE = re.compile(r"__\d{1,9}_\d{1,9}\.distcp", re.ASCII)
_NAME = re.compile(r"[!-~]{1,1000}")  # goes into messages and on terminals
_MAX_DIMENSIONS = 16
_MAX_SIZE = 2**62
DTYPES: dict[str, torch.dtype] = {
    str(kind): kind
    for kind in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_CLASSES = "torch.distributed.checkpoint.metadata."
_STORAGE = "torch.distributed.checkpoint.filesystem._StorageInfo"
_EXPECTED = frozenset(
    [
        *(_CLASSES + name for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "MetadataIndex")),
        *(_CLASSES + name for name in ("ChunkStorageMetadata", "BytesStorageMetadata", "StorageMeta")),
        *(_STORAGE, _CLASSES + "_MEM_FORMAT_ENCODING", "torch.Size", "torch.serialization._get_layout"),
        *("pathlib.PosixPath", "pathlib._local.PosixPath"),  # where the step was written, which nobody reads
        *DTYPES,
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A box of a tensor and the bytes of the archive that holds it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    num_bytes: int  # of the archive; the tensor's own are fewer


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A whole tensor: its chunks cover it exactly once."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


def read_index(folder: Path, *, passes_over_bytes: bool = False) -> dict[str, StoredTensor]:
    """The tensors of a step by name, in the order of the names.

    With `passes_over_bytes`, byte items, in which other programs keep random states and FP8 scales, stay where they
    are: not a byte of them is read.

    Raises UnsafeError where the file asks for anything that would run code (it names the file and the global, or the
    byte item), CheckpointError where it is missing, damaged or does not fit the files beside it.
    """
    path = folder / INDEX_FILE
    content = _read_small_file(path)
    root = read_records(content, path, _EXPECTED)
    try:
        fields = _fields(root, _CLASSES + "Metadata")
        entries = _pairs(fields["state_dict_metadata"])
        byte_items = _list_bytes(entries)
        if byte_items and not passes_over_bytes:
            raise UnsafeError(
                f"{path}: {_describe(byte_items[0])} is a byte item, a pickle that loading would run; "
                "save the step with this program, which writes none"
            )
        passed_over = frozenset(map(_name, byte_items))
        entries = Pairs((key, value) for key, value in entries if key not in passed_over)
        storage = _read_storage(_pairs(fields["storage_data"]), passed_over)
        index = _read_tensors(entries, storage)
        _check_files(folder, storage.values())
    except MetroError:
        raise
    except (ValueError, LookupError, AttributeError, TypeError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged ({first_line(error)[:300]}); choose another step") from error
    return dict(sorted(index.items()))


def _read_small_file(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CheckpointError(f"{path}: is no regular file; choose another step")
            content = file.read(MAX_INDEX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({first_line(error)}); choose another step") from error
    if len(content) > MAX_INDEX_BYTES:
        raise CheckpointError(f"{path}: is larger than {MAX_INDEX_BYTES} bytes; choose another step")
    return content


def _list_bytes(entries: Pairs) -> list[Any]:
    """Names of the items that are no tensors."""
    kind = _CLASSES + "BytesStorageMetadata"
    return [key for key, value in entries if type(value) is Record and value.name == kind]


def _read_storage(pairs: Pairs, passed_over: Container[Any]) -> dict[tuple[str, tuple[int, ...]], Chunk]:
    """Where each chunk of a tensor lies, by the tensor's name and the chunk's offset."""
    storage = {}
    for key, value in pairs:
        if _name(_fields(key, _CLASSES + "MetadataIndex")["fqn"]) not in passed_over:
            storage[_storage_key(key)] = _storage_place(value)
    return storage


def _read_tensors(entries: Pairs, storage: Mapping[tuple[str, tuple[int, ...]], Chunk]) -> dict[str, StoredTensor]:
    described = [(key, _fields(value, _CLASSES + "TensorStorageMetadata")) for key, value in entries]
    # A list may be named by many entries; each chunk has its own place, so there are no more chunks than places.
    if sum(len(fields["chunks"]) for _, fields in described) != len(storage):
        raise ValueError(f"has {len(storage)} places of chunks and another number of chunks")
    index: dict[str, StoredTensor] = {}
    for name, fields in described:
        if name in index:
            raise ValueError(f"describes {name} twice")
        index[name] = _read_tensor(_name(name), fields, storage)
    return index


def _read_tensor(
    name: str, fields: Mapping[str, Any], storage: Mapping[tuple[str, tuple[int, ...]], Chunk]
) -> StoredTensor:
    shape, dtype = _size(fields["size"]), _dtype(fields["properties"])
    if type(fields["chunks"]) is not list:
        raise ValueError(f"{name}: has no list of chunks")
    chunks = []
    for value in fields["chunks"]:
        box = _fields(value, _CLASSES + "ChunkStorageMetadata")
        offset, size = _size(box["offsets"]), _size(box["sizes"])
        place = storage[name, offset]
        if place.num_bytes < math.prod(size) * dtype.itemsize:
            raise ValueError(f"{name}: a chunk of shape {size} in {place.num_bytes} bytes")
        chunks.append(Chunk(offset=offset, shape=size, file=place.file, start=place.start, num_bytes=place.num_bytes))
    if not _is_covered_once(shape, chunks):
        raise ValueError(f"{name}: its chunks do not cover its shape {shape} exactly once")
    return StoredTensor(name=name, shape=shape, dtype=dtype, chunks=tuple(chunks))


def _is_covered_once(shape: tuple[int, ...], chunks: Iterable[Chunk]) -> bool:
    """Whether every element lies in exactly one chunk.

    Each coordinate gets a random height, and a box the product of its edges' differences, modulo a prime. The boxes
    add up to the whole when they tile it; when they do not, the difference is a polynomial in the heights that is not
    zero, and is missed with a probability of dimensions / 2^61. Linear time, where comparing pairs is quadratic.
    """
    prime, draw = 2**61 - 1, random.SystemRandom()
    heights: list[dict[int, int]] = [{} for _ in shape]

    def measure(offset: tuple[int, ...], size: tuple[int, ...]) -> int:
        volume = 1
        for height, start, length in zip(heights, offset, size):
            first, last = (height.setdefault(at, draw.randrange(prime)) for at in (start, start + length))
            volume = volume * (last - first) % prime
        return volume

    total = measure((0,) * len(shape), shape)
    for chunk in chunks:
        if not len(chunk.offset) == len(chunk.shape) == len(shape):
            return False
        if any(start + length > bound for start, length, bound in zip(chunk.offset, chunk.shape, shape)):
            return False
        total -= measure(chunk.offset, chunk.shape)
    return total % prime == 0


def _check_files(folder: Path, places: Iterable[Chunk]) -> None:
    """Every chunk lies inside a regular file of the folder, and no two share a byte."""
    by_file: dict[str, list[Chunk]] = {}
    for place in places:
        by_file.setdefault(place.file, []).append(place)
    for name, inside in by_file.items():
        status = (folder / name).lstat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{name} is no regular file")
        inside.sort(key=lambda place: place.start)
        if any(first.start + first.num_bytes > second.start for first, second in pairwise(inside)):
            raise ValueError(f"chunks share bytes of {name}")
        if (end := inside[-1].start + inside[-1].num_bytes) > status.st_size:
            raise ValueError(f"{name} has {status.st_size} bytes, chunks in it end at {end}")


def _fields(value: Any, name: str) -> dict[str, Any]:
    """The attributes of an object of this class."""
    if type(value) is not Record or value.name != name or value.arguments:
        raise ValueError(f"found {_describe(value)} in place of a {name.rpartition('.')[2]}")
    fields: dict[str, Any] = {}
    for key, content in _pairs(value.state):
        if type(key) is not str or key in fields:
            raise ValueError(f"a {name.rpartition('.')[2]} has {_describe(key)} as an attribute, or has one twice")
        fields[key] = content
    return fields


def _pairs(value: Any) -> Pairs:
    if type(value) is not Pairs:
        raise ValueError(f"found {_describe(value)} in place of a dictionary")
    return value


def _storage_key(value: Any) -> tuple[str, tuple[int, ...]]:
    fields = _fields(value, _CLASSES + "MetadataIndex")
    return _name(fields["fqn"]), _size(fields["offset"])


def _storage_place(value: Any) -> Chunk:
    """Where a chunk lies; its box is not known here."""
    fields = _fields(value, _STORAGE)
    file, start, length = fields["relative_path"], fields["offset"], fields["length"]
    if type(file) is not str or not _DATA_FILE.fullmatch(file):
        raise ValueError(f"{_describe(file)} is no name of a file of tensors")
    if fields.get("transform_descriptors"):
        raise ValueError(f"{file} is compressed or encrypted")
    return Chunk(offset=(), shape=(), file=file, start=_whole_number(start), num_bytes=_whole_number(length))


def _dtype(properties: Any) -> torch.dtype:
    state = properties.state if type(properties) is Record else None
    if type(state) is not tuple or not state or properties.name != _CLASSES + "TensorProperties":
        raise ValueError("a tensor has no properties")
    if type(state[0]) is not Global:
        raise ValueError(f"found {_describe(state[0])} in place of a type of numbers")
    return DTYPES[state[0].name]


def _size(value: Any) -> tuple[int, ...]:
    """A shape or an offset."""
    if type(value) is not Record or value.name != "torch.Size" or value.state is not None:
        raise ValueError(f"found {_describe(value)} in place of a shape")
    (numbers,) = value.arguments
    if type(numbers) is not tuple or len(numbers) > _MAX_DIMENSIONS:
        raise ValueError("a shape is no tuple of numbers")
    size = tuple(_whole_number(number) for number in numbers)
    if math.prod(size) > _MAX_SIZE:
        raise ValueError(f"the shape {size} has too many elements")
    return size


def _whole_number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_SIZE:
        raise ValueError(f"{_describe(value)} is no size")
    return value


def _name(value: Any) -> str:
    if type(value) is not str or not _NAME.fullmatch(value):
        raise ValueError(f"{_describe(value)} is no name of a tensor")
    return value


def _describe(value: Any) -> str:
    """A value in a message: short, escaped, and never a walk through what a hostile file has nested."""
    if type(value) is str:
        return ascii(value[:100])
    if type(value) is int and value.bit_length() < 128:
        return str(value)
    return f"a {type(value).__name__}"
