"""Folders of a model that lie, or try to run code: changes of a good one, each with what must be said of it."""

import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.helpers import hostile

WEIGHT = "encoder.block.0.layer.0.SelfAttention.q.weight"


@dataclass(frozen=True)
class BadFolder:
    """Something done to the folder of a T5, and how the tool must end."""

    name: str
    damage: Callable[[Path], object]
    code: int
    words: str


def list_bad_folders(command: str) -> list[BadFolder]:
    """All of them; `command` is what hostile ones try to run."""
    return [
        *_wrong_tensors(),
        *_wrong_headers(),
        *_wrong_indices(),
        *_wrong_configurations(),
        *_wrong_archives(command),
    ]


def _change(**changes: Any) -> Callable[[Path], None]:
    """Other tensors; None takes one away, and `weight` is a certain one."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        for name, make in changes.items():
            key = WEIGHT if name == "weight" else name
            tensors[key] = make(tensors.get(key))
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors")

    return damage


def _wrong_tensors() -> list[BadFolder]:
    def put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda weight: weight.index_fill(0, torch.tensor([3]), value)

    halves, columns = (lambda weight: weight.half()), (lambda weight: weight.t().contiguous())
    changes = {
        "a missing tensor": ({"weight": lambda _: None}, f"lacks {WEIGHT}"),
        "a tensor too many": ({"extra": lambda _: torch.ones(2)}, "holds extra (1 such tensors)"),
        "another shape": ({"weight": lambda weight: weight[1:].clone()}, f"{WEIGHT} has shape [14, 22]"),
        "transposed": ({"weight": columns}, "has shape [22, 15]"),
        "NaN": ({"weight": put(float("nan"))}, "numbers that are not finite"),
        "infinity": ({"weight": put(float("inf"))}, "numbers that are not finite"),
        "integers": ({"weight": lambda weight: weight.long()}, "give weights as floats"),
        "parts of two kinds": ({"weight": halves}, "give weights as floats of one kind"),
        "terminal codes in a name": ({"\x1b[31mred": lambda _: torch.ones(2)}, "is no name of a tensor"),
    }
    return [BadFolder(name, _change(**change), 66, words) for name, (change, words) in changes.items()]


def _wrong_headers() -> list[BadFolder]:
    def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
        def damage(folder: Path) -> None:
            path = folder / "model.safetensors"
            content = path.read_bytes()
            (length,) = struct.unpack("<Q", content[:8])
            entries = json.loads(content[8 : 8 + length])
            change(entries)
            written = json.dumps(entries).encode()
            path.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + length :])

        return damage

    def move(entries: dict[str, Any]) -> None:
        first, second = [entry for name, entry in entries.items() if name != "__metadata__"][:2]
        first["data_offsets"] = second["data_offsets"]

    def cut(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def write(content: bytes) -> Callable[[Path], object]:
        return lambda folder: (folder / "model.safetensors").write_bytes(content)

    grow = header(lambda entries: entries[WEIGHT].update(shape=[2**40, 2**20]))
    return [
        BadFolder("overlapping tensors", header(move), 66, "model.safetensors: cannot be read"),
        BadFolder("a shape beyond its bytes", grow, 66, "model.safetensors: cannot be read"),
        BadFolder("a truncated file", cut, 66, "model.safetensors: cannot be read"),
        BadFolder("a header of 2^63 bytes", write(struct.pack("<Q", 2**63) + b"{}"), 66, "cannot be read"),
        BadFolder("a header of 200 MB", write(struct.pack("<Q", 2 * 10**8) + b"{}"), 66, "cannot be read"),
        BadFolder("a deep header", write(struct.pack("<Q", 100_000) + b"[" * 100_000), 66, "cannot be read"),
        BadFolder("an empty file", write(b""), 66, "cannot be read"),
        BadFolder("no weights", lambda folder: (folder / "model.safetensors").unlink(), 66, "holds none of"),
    ]


def _wrong_indices() -> list[BadFolder]:
    def index(file: Any) -> Callable[[Path], None]:
        def damage(folder: Path) -> None:
            names = list(load_file(folder / "model.safetensors"))
            (folder / "model.safetensors").rename(folder / "one.safetensors")
            places = {**dict.fromkeys(names, "one.safetensors"), WEIGHT: file}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

        return damage

    names = ["../one.safetensors", "/etc/passwd", "a/b.safetensors", "one\0.safetensors", "-rf.safetensors", "one.pkl"]
    return [
        *(BadFolder(f"a shard called {name!a}", index(name), 66, "is no name of a file beside it") for name in names),
        BadFolder("a shard that is not there", index("two.safetensors"), 66, "two.safetensors: cannot be read"),
        BadFolder("a shard that is a number", index(3), 66, "has no weight_map"),
    ]


def _wrong_configurations() -> list[BadFolder]:
    def write(content: str) -> Callable[[Path], object]:
        return lambda folder: (folder / "config.json").write_text(content)

    def change(**changes: Any) -> Callable[[Path], object]:
        def damage(folder: Path) -> None:
            values = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**values, **changes}))

        return damage

    untied = {"tie_word_embeddings": False, "scale_decoder_outputs": False}
    values = {
        "another kind of model": ({"model_type": "gpt2"}, 66, "model_type is 'gpt2', not t5"),
        "text for a number": ({"d_model": "$(touch x)"}, 66, "d_model is '$(touch x)'"),
        "a truth for a number": ({"d_ff": True}, 66, "d_ff is True"),
        "a fraction of a layer": ({"num_layers": 1.5}, 66, "num_layers is 1.5"),
        "a huge model": ({"num_layers": 2**31 - 1}, 64, "--encoder-num-layers"),
        "another depth": ({"num_layers": 3}, 66, "lacks encoder.block.2"),
        "another activation": ({"feed_forward_proj": "gated-silu"}, 66, "feed_forward_proj is 'gated-silu'"),
        "untied in name alone": (untied, 66, "lacks lm_head.weight"),
        "no epsilon": ({"layer_norm_epsilon": 0.0}, 64, "--norm-epsilon"),
        "a list for a number": ({"vocab_size": [[]]}, 66, "vocab_size is a list"),
    }
    return [
        *(BadFolder(name, change(**changes), code, words) for name, (changes, code, words) in values.items()),
        BadFolder("no configuration", lambda folder: (folder / "config.json").unlink(), 66, "cannot be read"),
        BadFolder("a deep configuration", write("[" * 100_000), 66, "config.json: cannot be read"),
        BadFolder("a list", write("[1]"), 66, "holds no object"),
    ]


def _wrong_archives(command: str) -> list[BadFolder]:
    def write(make: Callable[[], bytes]) -> Callable[[Path], None]:
        def damage(folder: Path) -> None:
            (folder / "model.safetensors").unlink()
            (folder / "pytorch_model.bin").write_bytes(make())

        return damage

    def saved(value: Any, **options: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer, **options)
        return buffer.getvalue()

    def packed(*entries: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as file:
            for name, content in entries:
                file.writestr(name, content)
        return buffer.getvalue()

    def short() -> bytes:
        """A storage of 64 numbers where 127 are claimed."""
        changed, count = re.subn(rb"(cpuq.K)@", b"\\1\x7f", saved({"a": torch.zeros(64)}))
        assert count == 1
        return changed

    call, old = hostile.make_call(command), {"_use_new_zipfile_serialization": False}
    tensor, entry = {"a": torch.zeros(64)}, ("a/data.pkl", b"\x80\x02}.")
    bomb = ("a/data.pkl", bytes(20_000_000))
    archives: dict[str, tuple[Callable[[], bytes], int, str]] = {
        "a call beside tensors": (lambda: saved({**tensor, "b": call}), 77, "refers to 'posix.system'"),
        "a call in the old format": (lambda: saved(call, **old), 77, "refers to 'posix.system'"),
        "a sparse tensor": (lambda: saved({"a": torch.eye(3).to_sparse()}), 77, "refers to 'torch._utils"),
        "the old format": (lambda: saved(tensor, **old), 66, "newer torch.save"),
        "a zip bomb": (lambda: packed(bomb, compression=zipfile.ZIP_DEFLATED), 66, "compressed"),
        "two entries of one name": (lambda: packed(entry, entry), 66, "is in it twice"),
        "a billion numbers from one": (lambda: saved({"a": torch.zeros(1).expand(10**9)}), 66, "some of them twice"),
        "more numbers than bytes": (short, 66, "beyond its 256 bytes"),
        "a truncated archive": (lambda: saved(tensor)[:500], 66, "cannot be read"),
        "no dictionary": (lambda: saved(torch.zeros(3)), 66, "is no name of a tensor"),
        "text": (lambda: b"model", 66, "cannot be read"),
    }
    pickles = {kind: content for kind, (content, _) in hostile.payloads(command).items()}
    return [
        *(BadFolder(f"pickle: {kind}", write(partial(bytes, made)), 77, "refers to") for kind, made in pickles.items()),
        *(BadFolder(name, write(make), code, words) for name, (make, code, words) in archives.items()),
    ]
