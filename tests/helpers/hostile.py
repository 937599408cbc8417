"""Files that try to run code, exhaust memory or leave their folder. Everything is made when a test runs.

The pickles run a command when Python's own unpickler reads them, which a test shows of each.
"""

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

REFUSED = (64, 65, 66)


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


class _Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._what = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._what


def make_call(command: str) -> object:
    """An object whose pickle runs a command."""
    return _Call(os.system, command)


def payloads(command: str) -> dict[str, tuple[bytes, str]]:
    """Pickles by kind, each with the global that a refusal must name."""
    system = f"{os.system.__module__}.system"  # posix.system
    kinds = {
        f"protocol {protocol}": (pickle.dumps(_Call(os.system, command), protocol), system) for protocol in range(6)
    }
    stack = _short("os") + _short("system") + b"\x93" + _text(command) + b"\x85R"
    return kinds | {
        "inst": (b"(V" + command.encode() + b"\nios\nsystem\n.", "os.system"),
        "obj": (b"\x80\x02(cos\nsystem\n" + _text(command) + b"o.", "os.system"),
        "popen": (pickle.dumps(_Call(subprocess.call, ["sh", "-c", command]), 4), "subprocess.call"),
        "exec": (pickle.dumps(_Call(exec, f"import os; os.system({command!r})"), 4), "builtins.exec"),
        "dotted name": (
            b"\x80\x04" + _short("torch") + _short("serialization.os.system") + b"\x93" + _text(command) + b"\x85R.",
            "torch.serialization.os.system",
        ),
        "memo": (
            b"\x80\x04" + _short("system") + b"\x94" + _short("os") + b"\x94" + b"00h\x01h\x00\x93" + _text(command)
            + b"\x85R.",
            "os.system",
        ),
        "in a list": (b"\x80\x04]" + stack + b"a.", "os.system"),
        "in a dictionary": (b"\x80\x04}" + _short("a") + stack + b"s.", "os.system"),
        "in a tuple in a tuple": (b"\x80\x04" + stack + b"\x85\x85.", "os.system"),
        "as a state": (b"\x80\x04c" + b"torch\nSize\n)R" + stack + b"b.", "os.system"),
        "dropped": (b"\x80\x04" + stack + b"0N.", "os.system"),
        "framed": (b"\x80\x05\x95" + struct.pack("<Q", len(stack) + 1) + stack + b".", "os.system"),
    }  # fmt: skip


@dataclass(frozen=True)
class HostileFile:
    """Something done to a saved run's folder, and what every loader must make of it."""

    name: str
    poison: Callable[[Path], object]  # called with the step's folder
    code: int  # 77, 66, or 0 where the file is never read
    words: str = ""


def list_hostile_files(command: str) -> list[HostileFile]:
    """All of them; `command` is what they try to run."""
    return [
        *(
            HostileFile(f"metadata: {kind}", _writer(".metadata", content), 77, words)
            for kind, (content, words) in payloads(command).items()
        ),
        *_poisoned_metadata(command),
        *_false_metadata(),
        *_poisoned_shards(command),
        *_other_files(command),
    ]


def _writer(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda step: (step / name).write_bytes(content)


def _poisoned_metadata(command: str) -> list[HostileFile]:
    """The step's own metadata with something more in it."""
    body = _short("os") + _short("system") + b"\x93" + _text(command) + b"\x85R"

    def change(function: Callable[[bytes], bytes]) -> Callable[[Path], object]:
        return lambda step: (step / ".metadata").write_bytes(function((step / ".metadata").read_bytes()))

    def planner(step: Path) -> None:
        hidden = {"a": [_Call(os.system, command)]}
        _edit(step, lambda metadata: setattr(metadata, "planner_data", hidden))

    behind, before, second = (
        change(lambda whole: whole[:-1] + body + b"0."),
        change(lambda whole: b"\x80\x04" + body + b"0" + whole[2:]),
        change(lambda whole: whole + b"\x80\x04" + body + b"."),
    )
    namespace = b"\x80\x02cargparse\nNamespace\n)\x81}b."
    return [
        HostileFile("metadata: behind the end", behind, 77, "os.system"),
        HostileFile("metadata: before the beginning", before, 77, "os.system"),
        HostileFile("metadata: a second pickle", second, 77, "os.system"),
        HostileFile("metadata: planner data", planner, 77, "posix.system"),
        HostileFile("metadata: extension", _writer(".metadata", b"\x80\x02\x82\x01."), 77, "extension 1"),
        HostileFile("metadata: class with a state", _writer(".metadata", namespace), 77, "argparse.Namespace"),
        HostileFile("metadata: byte item", lambda step: _edit(step, _add_bytes), 77, "rng_state"),
    ]


def _add_bytes(metadata: Metadata) -> None:
    metadata.state_dict_metadata["rng_state/shard_0_1"] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex("rng_state/shard_0_1")] = _StorageInfo("__0_0.distcp", 0, 10)


def _edit(step: Path, change: Callable[[Metadata], object]) -> None:
    """Rewrite the metadata as torch would."""
    path = step / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


LIAR = "encoder.layers.0.mlp.linear_fc1.weight"


def _find_liar(metadata: Metadata) -> tuple[TensorStorageMetadata, MetadataIndex]:
    index = next(index for index in metadata.storage_data if index.fqn == LIAR)
    return metadata.state_dict_metadata[LIAR], index


def _place(**changes: Any) -> Callable[[Metadata], None]:
    """Another place for the numbers of a tensor."""

    def change(metadata: Metadata) -> None:
        for name, value in changes.items():
            setattr(metadata.storage_data[_find_liar(metadata)[1]], name, value)

    return change


def _shape(*size: Any) -> Callable[[Metadata], None]:
    """Another shape."""

    def change(metadata: Metadata) -> None:
        entry, _ = _find_liar(metadata)
        entry.size = entry.chunks[0].sizes = torch.Size(size)

    return change


def _add_chunk(metadata: Metadata) -> None:
    entry, index = _find_liar(metadata)
    entry.chunks.append(ChunkStorageMetadata(torch.Size([1, 0]), torch.Size([1, 1])))
    where = _StorageInfo(metadata.storage_data[index].relative_path, 0, 1)
    metadata.storage_data[MetadataIndex(LIAR, [1, 0], 1)] = where


def _make_hole(metadata: Metadata) -> None:
    _find_liar(metadata)[0].chunks[0].sizes = torch.Size([1, 1])


def _drop_place(metadata: Metadata) -> None:
    del metadata.storage_data[_find_liar(metadata)[1]]


def _share_bytes(metadata: Metadata) -> None:
    places = list(metadata.storage_data.values())
    places[0].offset = places[1].offset


def _change_type(metadata: Metadata) -> None:
    _find_liar(metadata)[0].properties = TensorProperties(dtype=torch.complex64)


def _repeat_chunks(metadata: Metadata) -> None:
    _find_liar(metadata)[0].chunks *= 100_000


def _false_metadata() -> list[HostileFile]:
    """Well-formed metadata that lies about tensors and files, and metadata that is too much."""
    lies: dict[str, Callable[[Metadata], object]] = {
        "path out of the folder": _place(relative_path="../../__0_0.distcp"),
        "absolute path": _place(relative_path="/etc/passwd"),
        "path of another file": _place(relative_path="manifest.json"),
        "path with a NUL": _place(relative_path="__0_0\0.distcp"),
        "missing file": _place(relative_path="__9_9.distcp"),
        "offset beyond the end": _place(offset=2**62),
        "negative offset": _place(offset=-1),
        "huge length": _place(length=2**62),
        "fractional offset": _place(offset=0.5),
        "transformed": _place(transform_descriptors=["zstd"]),
        "negative shape": _shape(-1, 16),
        "huge shape": _shape(2**40, 2**22),
        "huger shape": _shape(2**62, 2**62),
        "shape beyond its bytes": _shape(1000, 1000),
        "overlapping chunks": _add_chunk,
        "hole": _make_hole,
        "chunk without a place": _drop_place,
        "shared bytes": _share_bytes,
        "another type of numbers": _change_type,
        "a list a hundred thousand times": _repeat_chunks,
        "terminal codes in a name": lambda metadata: metadata.state_dict_metadata.update({"\x1b[31m": 1}),
        "no storage": lambda metadata: setattr(metadata, "storage_data", None),
    }
    codes = {_change_type: (77, "torch.complex64")}
    cases = [
        HostileFile(f"metadata: {name}", lambda step, lie=lie: _edit(step, lie), *codes.get(lie, (66, "")))  # type: ignore[misc]
        for name, lie in lies.items()
    ]
    bombs = {
        "truncated": b"\x80\x04\x8c",
        "empty": b"",
        "a number": b"\x80\x04K\x01.",
        "deep": b"\x80\x04" + b"]" * 9_000 + b"a" * 8_999 + b".",
        "deep tuples": b"\x80\x04)" + b"\x85" * 100_000 + b".",
        "many values": b"\x80\x04" + b"]" * 1_000_000 + b".",
        "memo bomb": b"\x80\x02Nr\xff\xff\xff\xff.",
        "length bomb": b"\x80\x04\x8d" + b"\xff" * 8 + b".",
        "itself": b"\x80\x04]\x94h\x00a.",
        "a frame too long": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
    }
    return [
        *cases,
        *(HostileFile(f"metadata: {name}", _writer(".metadata", content), 66) for name, content in bombs.items()),
    ]


def _poisoned_shards(command: str) -> list[HostileFile]:
    """A chunk replaced, in place, by something that is no plain tensor; the metadata says where it now ends."""
    payload = payloads(command)["protocol 2"][0]

    def replace_chunk(content: bytes) -> Callable[[Path], object]:
        # At least a page, so that the numbers of the tensor would have room.
        is_archive = content[:2] == b"PK"
        padded = content.rjust(4096) if is_archive else content.ljust(4096)

        def poison(step: Path) -> None:
            shard = step / "__0_0.distcp"

            def move(metadata: Metadata) -> None:
                name = "encoder.layers.0.mlp.linear_fc1.bias"
                place = next(place for index, place in metadata.storage_data.items() if index.fqn == name)
                place.offset, place.length = shard.stat().st_size, len(padded)

            _edit(step, move)
            with shard.open("ab") as file:
                file.write(padded)

        return poison

    def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as file:
            for name, content in entries.items():
                file.writestr(name, content)
        return buffer.getvalue()

    def saved(value: Any, **options: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer, **options)
        return buffer.getvalue()

    system = _Call(os.system, command)
    twice = archive({"archive/data.pkl": payload})
    plain = saved(torch.zeros(32))
    contents: dict[str, tuple[bytes, int]] = {
        "payload in a zip": (archive({"archive/data.pkl": payload, "archive/byteorder": b"little"}), 77),
        "payload saved by torch": (saved(system), 77),
        "payload in the old format": (saved(system, _use_new_zipfile_serialization=False), 77),
        "payload beside a tensor": (saved([torch.zeros(32), system]), 77),
        "bare pickle": (payload, 77),
        "state dictionary": (saved({"a": torch.zeros(32)}), 66),
        "another type": (saved(torch.zeros(32, dtype=torch.int32)), 66),
        "another shape": (saved(torch.zeros(8, 4)), 66),
        "a view of more": (saved(torch.zeros(64)[::2]), 66),
        "needs gradients": (saved(torch.zeros(32, requires_grad=True)), 66),
        "sparse": (saved(torch.zeros(32).to_sparse()), 77),
        "zip bomb": (archive({"archive/data.pkl": b"\0" * 50_000_000}, zipfile.ZIP_DEFLATED), 66),
        "no archive": (b"PK" + b"\0" * 5000, 66),
        "two directories": (twice + plain[:-22], 77),
        "truncated archive": (plain[:-1], 66),
    }
    return [
        HostileFile(f"shard: {name}", replace_chunk(content), code, "torch._utils" if name == "sparse" else ".system")
        for name, (content, code) in contents.items()
    ]


def _other_files(command: str) -> list[HostileFile]:
    payload = payloads(command)["protocol 2"][0]

    def write(name: str, content: bytes) -> Callable[[Path], object]:
        return lambda step: (step / name).write_bytes(content)

    def without_metadata(step: Path) -> None:
        (step / ".metadata").rename(step / "__0.metadata")
        (step / "__0.metadata").write_bytes(payload)

    def link(step: Path) -> None:
        shutil.move(step / "__0_0.distcp", step.parent / "elsewhere")
        (step / "__0_0.distcp").symlink_to(step.parent / "elsewhere")

    def link_metadata(step: Path) -> None:
        shutil.move(step / ".metadata", step.parent / "elsewhere")
        (step / ".metadata").symlink_to(step.parent / "elsewhere")

    def pipe(step: Path) -> None:
        (step / ".metadata").unlink()
        os.mkfifo(step / ".metadata")

    return [
        HostileFile("common.pt: a pickle", write("common.pt", payload), 0),
        HostileFile("metadata.json: a bomb", write("metadata.json", b"[" * 100_000), 0),
        HostileFile("a pickle that torch falls back to", without_metadata, 66),
        HostileFile("metadata is a link", link_metadata, 66),
        HostileFile("shard is a link", link, 66),
        HostileFile("metadata is a pipe", pipe, 66),
    ]


def hostile_documents(document: dict[str, Any]) -> dict[str, bytes]:
    """What a step says of its run, made false: JSON that no loader may trip over."""

    def changed(section: str, name: str, value: Any) -> bytes:
        config = {key: dict(settings) for key, settings in document["config"].items()}
        config[section][name] = value
        return json.dumps({**document, "config": config}).encode()

    return {
        "deep": b'{"version": 2, "train": ' + b"[" * 100_000,
        "not JSON": b"\x80\x04K\x01.",
        "a list": b"[1, 2]",
        "no configuration": json.dumps({**document, "config": None}).encode(),
        "a huge model": changed("model", "hidden_size", 2**40),
        "a deep model": changed("model", "encoder_num_layers", 10_000),
        "a wide model": changed("model", "ffn_hidden_size", 2**30),
        "text for a number": changed("model", "hidden_size", "$(touch x)"),
        "a list for a number": changed("model", "hidden_size", [[]]),
        "an unknown setting": changed("model", "no_such_setting", 1),
        "not a number": changed("model", "hidden_dropout", float("nan")),
        "iteration": json.dumps({**document, "train": {"iteration": "__import__('os')"}}).encode(),
    }
