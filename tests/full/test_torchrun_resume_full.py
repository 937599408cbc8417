"""Forty jobs under torchrun, stopped in four ways in four layouts and started again: the end is that of a calm run.

Compared are every tensor of the last step (weights, optimizer state, random states), its counters and every log line.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from megatron.core.dist_checkpointing import load_plain_tensors

from megatron_metro.checkpoint.folder import read_document, step_folder
from megatron_metro.config.cli import save_config
from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers.exact import LAYOUTS, make_run, read_metrics
from tests.helpers.markov import write_source
from tests.helpers.repository import ROOT

pytestmark = pytest.mark.full

NUM_STEPS = 40
# What is trained in a layout.
KIND_OF = {
    "one": "metro, AdamW",
    "dp2": "metro, AdamW, BF16",
    "tp2": "spactor, Adafactor",
    "pp2": "t5, AdamW, FP16",
}


class Job:
    """A run under torchrun, from a configuration file and more flags."""

    def __init__(self, layout: str, config: Path, folder: Path, *flags: object) -> None:
        world_size, _ = LAYOUTS[layout]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
        tool = ["tools/pretrain.py", "--config", str(config), "--save", str(folder), "--load", str(folder)]
        self.folder = folder
        self.log = folder.with_suffix(".log")
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, *tool, *map(str, flags)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdout=log,
                stderr=log,
            )

    def wait_for_step(self, step: int) -> None:
        """Until the run has logged a step."""
        metrics, deadline = self.folder / "metrics.jsonl", time.monotonic() + 300.0
        while not metrics.exists() or metrics.read_text().count("\n") < step:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.002)

    def finish(self) -> int:
        """Its exit code."""
        return self.process.wait(600)

    def finish_well(self) -> None:
        assert self.finish() == 0, self.log.read_text()


def stop_at_step(layout: str, config: Path, folder: Path, step: int, *flags: object) -> None:
    """The run ends by itself after a step, and saves it."""
    Job(layout, config, folder, "--exit-interval", step, *flags).finish_well()
    assert newest_step(folder) == step


def stop_in_the_background(layout: str, config: Path, folder: Path, step: int) -> None:
    """The same, written while training goes on."""
    stop_at_step(layout, config, folder, step, "--async-save")


def terminate(layout: str, config: Path, folder: Path, step: int) -> None:
    """As a scheduler asks a job to end: ranks save where they are and lose nothing."""
    job = Job(layout, config, folder, "--exit-signal-handler", "--save-interval", NUM_STEPS)
    job.wait_for_step(step)
    job.process.send_signal(signal.SIGTERM)
    assert job.finish() != 0
    assert newest_step(folder) >= step


def kill(layout: str, config: Path, folder: Path, step: int) -> None:
    """Every process of the job, at once."""
    job = Job(layout, config, folder)
    job.wait_for_step(step)
    doomed = [*psutil.Process(job.process.pid).children(recursive=True), psutil.Process(job.process.pid)]
    for process in doomed:
        process.kill()
    assert job.finish() != 0
    psutil.wait_procs(doomed, timeout=10)


MODES: dict[str, Callable[[str, Path, Path, int], None]] = {
    "sync": stop_at_step,
    "async": stop_in_the_background,
    "SIGTERM": terminate,
    "SIGKILL": kill,
}
# Ten runs of each mode, over all layouts.
RUNS = [(mode, list(LAYOUTS)[number % 4], number) for mode in MODES for number in range(10)]


def newest_step(folder: Path) -> int:
    return int((folder / "latest_checkpointed_iteration.txt").read_text())


def read_state(folder: Path) -> dict[str, Any]:
    state = read_document(step_folder(folder, NUM_STEPS))
    return {part: state[part] for part in ("train", "optimizer", "identity")}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """`calm(layout)`: the configuration of its run and the folder of one that nobody disturbed, made once."""
    home = tmp_path_factory.mktemp("calm")
    source = write_source(home, num_documents=20, length=120)

    def make(layout: str) -> tuple[Path, Path]:
        config, folder = home / f"{layout}.yaml", home / layout
        if not folder.exists():
            run = make_run(KIND_OF[layout], layout, source, folder, NUM_STEPS, log_interval=1, eval_iters=0)
            save_config(run, config)
            Job(layout, config, folder).finish_well()
        return config, folder

    return make


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("mode", "layout", "number"), RUNS)
def test_a_stopped_job_ends_as_a_calm_one(
    mode: str,
    layout: str,
    number: int,
    calm: Callable[[str], tuple[Path, Path]],
    groups: ParallelGroups,
    tmp_path: Path,
) -> None:
    config, expected = calm(layout)
    folder = tmp_path / "run"
    MODES[mode](layout, config, folder, random.Random(f"{mode} {number}").randrange(NUM_STEPS // 2 + 1, NUM_STEPS - 2))
    Job(layout, config, folder).finish_well()
    mine, other = (load_plain_tensors(str(run / f"iter_{NUM_STEPS:07d}")) for run in (folder, expected))
    assert mine.keys() == other.keys()
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []
    assert read_state(folder) == read_state(expected)
    assert read_metrics(folder) == read_metrics(expected)
