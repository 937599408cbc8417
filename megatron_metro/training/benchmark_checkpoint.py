"""What checkpoints cost: the share of hashing in a save, the rate of verification, what --async-save takes."""

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_metro.checkpoint.manifest import verify_contents
from megatron_metro.checkpoint.writer import WriterProcess, to_host, write_tensors
from megatron_metro.training.benchmark import time_side_by_side

NUM_TENSORS, TENSOR_SHAPE = 32, (2048, 1024)  # 8 MiB each, 256 MiB together
_FOREVER = 3600.0


def measure_checkpoint(
    folder: Path, num_rounds: int, num_warmups: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """The benchmark's result; `folder` takes a few files, whose disk is part of what is measured.

    A rank's file is written with its hash and without, in turn; both are synchronised. Verification reads it from the
    page cache. `background` is what --async-save takes from training: copies and the start of the writer.
    """
    tensors = [torch.randn(TENSOR_SHAPE) for _ in range(NUM_TENSORS)]
    record = write_tensors(folder / "shard", tensors).record
    contestants = {
        "plain": lambda: _write_plain(_fresh(folder / "plain"), tensors),
        "hashed": lambda: _write_hashed(_fresh(folder / "hashed"), tensors),
        "verified": lambda: verify_contents(folder, ["shard"], {"shard": record}),
    }
    timings = time_side_by_side(contestants, num_rounds, num_warmups, report)
    shares = [1 - plain.clock / hashed.clock for plain, hashed in zip(timings["plain"], timings["hashed"])]
    seconds = {name: statistics.median(timing.clock for timing in taken) for name, taken in timings.items()}
    verifying = statistics.median(timing.processor for timing in timings["verified"])
    background = time_side_by_side({"background": lambda: _start_and_end(folder, tensors)}, num_rounds, 1, report)
    return {
        "file_bytes": record.size,
        "save_seconds": {name: round(seconds[name], 4) for name in ("plain", "hashed")},
        "hashing_share_of_save": round(statistics.median(shares), 4),
        "verify_gb_per_core_second": round(record.size / verifying / 1e9, 3),
        "background_blocks_seconds": round(statistics.median(t.clock for t in background["background"]), 4),
    }


def _fresh(path: Path) -> Path:
    path.unlink(missing_ok=True)
    return path


def _write_hashed(path: Path, tensors: list[Tensor]) -> None:
    write_tensors(path, tensors)


def _write_plain(path: Path, tensors: list[Tensor]) -> None:
    """The same file without its hash."""
    with open(path, "xb", buffering=0) as file:
        for tensor in tensors:
            torch.save(to_host(tensor), file)
        os.fsync(file.fileno())


def _start_and_end(folder: Path, tensors: list[Tensor]) -> None:
    writer = WriterProcess(_fresh(folder / "background"), [to_host(tensor, copy=True) for tensor in tensors], _FOREVER)
    writer.close()
