"""Conversion holds one weight at a time: its peak memory does not grow with the model."""

from pathlib import Path

import pytest
import torch

from megatron_metro.conversion.convert import Conversion, convert
from megatron_metro.conversion.hf_t5 import FORMAT, name_weights
from megatron_metro.conversion.tensor_files import write_folder
from tests.helpers import conversions

SIZES = {"d_model": 256, "d_kv": 32, "num_heads": 8, "d_ff": 1024, "num_layers": 12}
LARGEST = 256 * 1024 * 4  # bytes of the largest weight
ALLOWED = 24 * LARGEST  # a few copies of it, names, buffers, what the allocator keeps


def make_folder(folder: Path) -> int:
    """A T5 of ones and its size in bytes."""
    from transformers import T5Config

    from megatron_metro.conversion.foreign import Fields
    from megatron_metro.model.weights import weight_shapes

    folder.mkdir()
    config = T5Config(**{**conversions.T5_SIZES, **SIZES})
    config.architectures = ["T5ForConditionalGeneration"]
    config.save_pretrained(folder)

    class Nothing:
        names = staticmethod(tuple)

    model = FORMAT.read_run(Fields(folder, config.to_dict()), Nothing()).model
    shapes = weight_shapes(model)
    parts = {
        n: (s, torch.float32) for rule in name_weights(model) for n, s in rule.list_parts(shapes[rule.ours]).items()
    }
    write_folder(folder, parts, ((name, torch.ones(shape)) for name, (shape, _) in parts.items()))
    return sum(torch.Size(shape).numel() * 4 for shape, _ in parts.values())


def reset_peak() -> int:
    """Forget the process's peak; bytes in use now, mapped files included."""
    Path("/proc/self/clear_refs").write_text("5")
    return read_status("VmRSS")


def read_status(name: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def save_as_bin(folder: Path, target: Path) -> None:
    from safetensors.torch import load_file

    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(load_file(folder / "model.safetensors"), target / "pytorch_model.bin")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_peak_memory_is_that_of_a_few_weights(form, tmp_path):
    folder = tmp_path / "theirs"
    size = make_folder(folder)
    if form == "bin":
        save_as_bin(folder, tmp_path / "bin")
        folder = tmp_path / "bin"
    conversions.make_t5().save_pretrained(tmp_path / "small")
    conversions.convert_to_ours("hf-t5", tmp_path / "small", tmp_path / "first")  # what is loaded once
    start = reset_peak()
    conversions.convert_to_ours("hf-t5", folder, tmp_path / "ours")
    there = read_status("VmHWM") - start
    start = reset_peak()
    convert(Conversion(source="megatron", target="hf-t5", input=tmp_path / "ours", output=tmp_path / "back"))
    back = read_status("VmHWM") - start
    assert size > 3 * ALLOWED and max(there, back) <= ALLOWED, (
        f"{size} bytes of weights, {there} and {back} at the peak"
    )
