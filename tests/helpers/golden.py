"""Losses of a fixed short run of metro-tiny, kept per type of processor in tests/golden/metro_tiny.json.

    python -m tests.helpers.golden             compares this machine's with what is kept
    python -m tests.helpers.golden --refresh   keeps this machine's

Refresh after a change of numbers that is meant, and show the old and the new ones in its description.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_metro.config.files import write_atomically
from megatron_metro.device import Device, activate
from megatron_metro.parallel.groups import single_process
from megatron_metro.training.engine import Engine
from tests.helpers.full_tier import describe_cpu
from tests.helpers.markov import Curves, Metrics, markov_run, train, write_source

GOLDEN_FILE = Path(__file__).resolve().parents[1] / "golden" / "metro_tiny.json"
NUM_STEPS = 150
NUM_FIRST_STEPS = 20
# Rounding that differs between releases of torch stays below the first for so many steps, and grows to the second.
FIRST_TOLERANCE = 1e-4
LAST_TOLERANCE = 3e-2
LOSSES = ("lm_loss", "mlm_loss", "rtd_loss")
FIRST_VALUES = (*LOSSES, "grad_norm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """What is kept of a run: values of its first steps by name, losses of its last one."""

    torch: str  # release that computed them; not compared
    first: dict[str, list[float]]
    last: dict[str, float]


def run_golden(
    folder: Path, device: Device, mutate: Callable[[Engine], AbstractContextManager[None]] | None = None
) -> Curves:
    """The fixed run, in one thread of this process."""
    assert torch.get_num_threads() == 1, "the order of sums depends on the number of threads"
    run = markov_run(write_source(folder), folder / "run", NUM_STEPS, log_interval=1)
    return train(run, device, single_process(device), mutate)


def describe_hardware() -> str:
    """What the values depend on: the processor and the widest instructions torch uses on it."""
    return f"{describe_cpu()}, {torch.backends.cpu.get_cpu_capability()}"


def condense(steps: list[Metrics]) -> Golden:
    """What is kept of a run's steps."""
    return Golden(
        torch=torch.__version__,
        first={name: [float(f"{step[name]:.8g}") for step in steps[:NUM_FIRST_STEPS]] for name in FIRST_VALUES},
        last={name: float(f"{steps[-1][name]:.8g}") for name in LOSSES},
    )


def first_error(found: Golden, kept: Golden) -> float:
    """Largest relative difference within the first steps."""
    return max(_error(a, b) for name in FIRST_VALUES for a, b in zip(found.first[name], kept.first[name], strict=True))


def last_error(found: Golden, kept: Golden) -> float:
    """Largest relative difference of the last step's losses."""
    return max(_error(found.last[name], kept.last[name]) for name in LOSSES)


def _error(found: float, kept: float) -> float:
    return abs(found - kept) / abs(kept)


def read_golden(path: Path = GOLDEN_FILE) -> dict[str, Golden]:
    """Kept values by hardware."""
    if not path.exists():
        return {}
    return {hardware: Golden(**values) for hardware, values in json.loads(path.read_text()).items()}


def format_golden(values: Mapping[str, Golden]) -> str:
    """The file: JSON with a line per list, so that a refresh is easy to read."""

    def format_entry(golden: Golden) -> str:
        rows = [f"   {json.dumps(name)}: {json.dumps(steps)}" for name, steps in golden.first.items()]
        first = "{\n" + ",\n".join(rows) + "\n  }"
        return (
            f'{{\n  "torch": {json.dumps(golden.torch)},\n  "first": {first},\n  "last": {json.dumps(golden.last)}\n }}'
        )

    entries = [f" {json.dumps(hardware)}: {format_entry(golden)}" for hardware, golden in sorted(values.items())]
    return "{\n" + ",\n".join(entries) + "\n}\n"


def main() -> None:
    """Compare or refresh the values of this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refresh", action="store_true", help="keep this machine's values")
    refresh = parser.parse_args().refresh
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = condense(run_golden(Path(folder), activate("cpu")).steps)
    hardware, values = describe_hardware(), read_golden()
    if kept := values.get(hardware):
        print(f"{hardware}: first {NUM_FIRST_STEPS} steps differ by {first_error(found, kept):.2e} at most")
        print(f"{hardware}: step {NUM_STEPS} differs by {last_error(found, kept):.2e} at most")
    else:
        print(f"{hardware}: no values are kept")
    if refresh:
        write_atomically(GOLDEN_FILE, format_golden({**values, hardware: found}).encode())
        print(f"{GOLDEN_FILE.name}: refreshed")


if __name__ == "__main__":
    main()
