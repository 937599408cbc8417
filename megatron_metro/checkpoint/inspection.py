"""What a person or a script wants to know of saved steps: which there are, what is in them, where they come from."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from megatron_metro.checkpoint.folder import RELEASE, list_iterations, step_folder
from megatron_metro.checkpoint.manifest import MANIFEST, list_files, verify_contents
from megatron_metro.checkpoint.reader import StepReader, open_step
from megatron_metro.config.errors import CheckpointError

_BLOCK = 1 << 22  # numbers measured at once, in float64


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorReport:
    """A tensor and the statistics of its finite numbers; None where it has none, or is no tensor of real numbers."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    norm: float | None
    minimum: float | None
    maximum: float | None
    num_nan: int
    num_inf: int


def list_steps(folder: Path, iteration: int | None) -> list[Path]:
    """The steps of a run's folder, oldest first after released weights, or the one asked for, or a step's own folder.

    Raises CheckpointError where there is none.
    """
    if iteration is not None:
        found = [step_folder(folder, iteration)]
    elif folder.name.startswith("iter_") or (folder / MANIFEST).is_file():
        found = [folder]
    else:
        found = [step_folder(folder, number) for number in list_iterations(folder)]
        found = [path for path in (folder / RELEASE, *found) if path.is_dir()]
    if not found or not found[0].is_dir():
        raise CheckpointError(f"{found[0] if found else folder}: holds no checkpoint; give the folder of a run")
    return found


def verify_steps(steps: Sequence[Path]) -> None:
    """Compare every byte of steps with their manifests and print a line for each, under a progress bar.

    Raises CheckpointError or UnsafeError.
    """
    records = {step: list_files(step) for step in steps}
    total = sum(record.size for files in records.values() for record in files.values())
    with tqdm(total=total, disable=None, unit="B", unit_scale=True) as progress:
        for step, files in records.items():
            for name, record in files.items():
                verify_contents(step, [name], files)
                progress.update(record.size)
            progress.write(f"{step}: whole, {len(open_step(step, verify=False).names())} tensors")


def describe_step(step: Path) -> dict[str, Any]:
    """Where a step comes from and, as `tensors`, what is in it; plain JSON. Raises CheckpointError or UnsafeError."""
    reader = open_step(step)
    reports = list(tqdm(report_tensors(reader), disable=None, total=len(reader.names()), unit="tensor"))
    origin = {"step": str(reader.folder), **describe_origin(reader.document), "total": total(reports)}
    return {**origin, "tensors": [asdict(report) for report in reports]}


def format_step(description: Mapping[str, Any]) -> Iterator[str]:
    """The same as lines for people."""
    yield from format_origin({name: value for name, value in description.items() if name != "tensors"})
    yield from format_table([TensorReport(**tensor) for tensor in description["tensors"]])


def report_tensors(reader: StepReader) -> Iterator[TensorReport]:
    """Every tensor in the order of the names; one at a time is in memory."""
    for name in reader.names():
        tensor = reader.read(name)
        kind = str(tensor.dtype).removeprefix("torch.")
        yield TensorReport(name=name, shape=reader.shape(name), dtype=kind, **_measure(tensor))


def _measure(tensor: Tensor) -> dict[str, Any]:
    """Norm, extremes and what is not finite, summed block by block in float64."""
    squares, lowest, highest, num_nan, num_inf = 0.0, math.inf, -math.inf, 0, 0
    for block in tensor.flatten().split(_BLOCK) if tensor.is_floating_point() else ():
        numbers = block.double()
        num_nan += int(numbers.isnan().sum())
        num_inf += int(numbers.isinf().sum())
        numbers = numbers[numbers.isfinite()]
        if len(numbers):
            squares += float(numbers.square().sum())
            lowest, highest = min(lowest, float(numbers.min())), max(highest, float(numbers.max()))
    is_known = lowest <= highest
    return {
        "norm": math.sqrt(squares) if is_known else None,
        "minimum": lowest if is_known else None,
        "maximum": highest if is_known else None,
        "num_nan": num_nan,
        "num_inf": num_inf,
    }


def total(reports: list[TensorReport]) -> dict[str, int]:
    """Tensors, numbers in them, and how many of those are not finite."""
    return {
        "num_tensors": len(reports),
        "num_elements": sum(math.prod(report.shape) for report in reports),
        "num_nan": sum(report.num_nan for report in reports),
        "num_inf": sum(report.num_inf for report in reports),
    }


def describe_origin(document: Mapping[str, Any]) -> dict[str, Any]:
    """Where a step comes from: counters, layout, versions, tokenizer and data, and the settings that name the model."""
    config = document.get("config")
    model = config.get("model") if isinstance(config, Mapping) else None
    origin = {name: document.get(name) for name in ("train", "layout", "versions", "identity", "optimizer")}
    return {**origin, "model": model}


def format_table(reports: list[TensorReport]) -> Iterator[str]:
    """Aligned lines: a heading and one line for each tensor."""
    heading = [field.name for field in fields(TensorReport)]
    rows = [heading, *([_show(value) for value in asdict(report).values()] for report in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def format_origin(origin: Mapping[str, Any]) -> Iterator[str]:
    """One line for each part; what a file says is escaped before it reaches a terminal."""
    for name, value in origin.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        yield f"{name}: {ascii(str(value))[1:-1]}"


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "scalar"
    return "-" if value is None else str(value)
