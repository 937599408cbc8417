"""Tensors in the files of a Hugging Face folder, read one at a time: safetensors or weights-only .bin, maybe sharded.

What is written is safetensors, tensor by tensor, in the shards and with the index that transformers expects.
"""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_metro.checkpoint.state_file import StateFile
from megatron_metro.config.errors import CheckpointError, first_line
from megatron_metro.config.files import synchronise
from megatron_metro.conversion.weights import TensorFile

SAFETENSORS = "model.safetensors"
_CANDIDATES = (SAFETENSORS, f"{SAFETENSORS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
MAX_SHARD_BYTES = 5 * 10**9
_MAX_JSON_BYTES = 1 << 26
_FILE_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,200}\.(safetensors|bin|pt)", re.ASCII)
_TENSOR_NAME = re.compile(r"[!-~]{1,1000}")  # goes into messages and on terminals
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}
_HEADER_ALIGNMENT = 8


class SafetensorsFile:
    """One file of safetensors, mapped only while a tensor is read. Raises CheckpointError where it is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
                self._shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                self._kinds = {name: str(part.get_dtype()) for name, part in slices.items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({first_line(error)[:300]}); give a whole file") from error

    def names(self) -> tuple[str, ...]:
        """All tensors."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of `names`."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """As stored; what is no float of this program is told apart as bool."""
        return _TORCH_DTYPES.get(self._kinds[name], torch.bool)

    def read(self, name: str) -> Tensor:
        """The tensor in new memory."""
        with safe_open(self._path, framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()


class ShardedTensors:
    """Tensors of several files as those of one."""

    def __init__(self, files: Mapping[str, TensorFile]) -> None:
        self._files = dict(files)  # by name of the tensor

    def names(self) -> tuple[str, ...]:
        """All tensors."""
        return tuple(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of `names`."""
        return self._files[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._files[name].dtype(name)

    def read(self, name: str) -> Tensor:
        """The tensor in new memory."""
        return self._files[name].read(name)


def open_folder(folder: Path) -> TensorFile:
    """The weights of a folder as transformers saves them.

    Raises CheckpointError where there are none, where the index names what is not there, or a file is damaged;
    UnsafeError where a file asks for anything that would run code.
    """
    found = next((folder / name for name in _CANDIDATES if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder}: holds none of {', '.join(_CANDIDATES)}; give the folder of a model")
    tensors = open_file(found) if found.suffix != ".json" else _open_shards(found)
    for name in tensors.names():
        if not _TENSOR_NAME.fullmatch(name):
            raise CheckpointError(f"{found}: {name[:100]!a} is no name of a tensor; give a model's own file")
    return tensors


def open_file(path: Path) -> TensorFile:
    """One file of weights, by its ending; raises as `open_folder`."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else StateFile(path)


def _open_shards(index: Path) -> TensorFile:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index}: has no weight_map of tensors to files; give a model's own index")
    files = {}
    for name in sorted(set(places.values())):
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{index}: {name[:100]!a} is no name of a file beside it; give a model's own index")
        files[name] = open_file(index.with_name(name))
    for name, file in files.items():
        inside = {tensor for tensor, place in places.items() if place == name}
        if different := inside ^ set(file.names()):
            raise CheckpointError(f"{index}: {name} and the index differ in {min(different)[:100]!a}; get both again")
    return ShardedTensors({tensor: files[place] for tensor, place in places.items()})


def read_json(path: Path) -> dict[str, Any]:
    """An object in a small file. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON_BYTES + 1)
        value = json.loads(content) if len(content) <= _MAX_JSON_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({first_line(error)[:200]}); give the file it was") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no object, or more than {_MAX_JSON_BYTES} bytes; give the file it was")
    return value


def write_folder(
    folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write tensors, given in the order of `shapes`, into a folder; one at a time is in memory. Raises OSError."""
    shards = _plan_shards(shapes)
    stream = iter(tensors)
    names = [_name_shard(number, len(shards)) for number in range(len(shards))]
    for name, shard in zip(names, shards):
        _write_file(folder / name, {tensor: shapes[tensor] for tensor in shard}, lambda: next(stream))
    if len(shards) > 1:
        places = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        total = sum(_count_bytes(*described) for described in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _plan_shards(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> list[list[str]]:
    """Names of the tensors of each shard: as many as fit, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, described in shapes.items():
        size += _count_bytes(*described)
        if shards[-1] and size > MAX_SHARD_BYTES:
            shards.append([])
            size = _count_bytes(*described)
        shards[-1].append(name)
    return shards


def _name_shard(number: int, count: int) -> str:
    return SAFETENSORS if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _count_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _write_file(
    path: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    take: Callable[[], tuple[str, Tensor]],
) -> None:
    """One file: the length of the header, the header as JSON, the numbers.

    The library's own writer wants all tensors of a file in memory, and copies them once more.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in shapes.items():
        start, end = end, end + _count_bytes(shape, dtype)
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _HEADER_ALIGNMENT)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, described in shapes.items():
            found, tensor = take()
            assert (found, (tuple(tensor.shape), tensor.dtype)) == (name, described), f"{found} is not {name}"
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    synchronise(path.parent)
