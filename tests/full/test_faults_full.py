"""Faults in large numbers: times from a fault to the end of the job, whom it names, and signals at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.corpus import build_corpus
from tests.helpers.distributed import free_port
from tests.helpers.fault_runs import SMALL, JobEnd, Jobs, read_losses
from tests.helpers.repository import ROOT
from tests.helpers.tool_server import ToolServer

pytestmark = pytest.mark.full

DEAD_SECONDS = 5.0
HANG_LIMIT = 8
HANG_SECONDS = HANG_LIMIT + 35.0
POINTS = ("data", "forward", "backward", "grad-sync", "optimizer", "report")
DEATHS = [
    *(f"{point}:{rank}:3:kill" for point, rank in product(POINTS, range(2))),
    *(f"{point}:{rank}:3:{action}" for point, rank, action in product(("forward", "optimizer"), range(2), (
        "segv", "exit0", "exit3", "sysexit0", "bug", "data-error",
    ))),
    "save:0:4:kill", "save:1:4:kill", "evaluate:0:4:kill", "evaluate:1:4:kill",
]  # fmt: skip
HANGS = [
    f"{point}:{rank}:3:{action}"
    for action, point, rank in product(
        ("sleep", "lock", "stop"), ("data", "forward", "grad-sync", "optimizer", "report"), range(2)
    )
]
WHILE_BUSY = (
    "--eval-iters",
    2,
    "--eval-interval",
    5,
    "--save-interval",
    5,
    "--lr-decay-iters",
    1000,
    "--train-iters",
    1000,
)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    corpus = build_corpus(tmp_path_factory.mktemp("corpus"))
    with ToolServer(tmp_path_factory.mktemp("runs")) as server:
        yield Jobs(server, corpus, tmp_path_factory.mktemp("jobs"))


def describe_times(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return f"{len(ordered)} runs, median {ordered[len(ordered) // 2]:.2f} s, longest {ordered[-1]:.2f} s"


def is_named(end: JobEnd, culprit: int) -> bool:
    """Whether every other rank says who it was."""
    return all(
        f"rank {culprit} (pid" in status["message"] or f"rank {culprit} ended with" in status["message"]
        for status in end.statuses
        if status["rank"] != culprit
    )


def test_dead_ranks(jobs: Jobs, record_property: Any) -> None:
    seconds, unnamed = [], []
    for fault in DEATHS:
        end = jobs.run(*WHILE_BUSY, fault=fault)
        culprit = int(fault.split(":")[1])
        assert end.codes[1 - culprit] == 78, (fault, end)
        assert end.error_of(1 - culprit)
        seconds.append(end.seconds)
        if not is_named(end, culprit):
            unnamed.append((fault, end.statuses[1 - culprit]["message"]))
    record_property("dead rank to job gone", describe_times(seconds))
    record_property("culprit named", f"{len(DEATHS) - len(unnamed)} of {len(DEATHS)}")
    assert unnamed == []
    assert max(seconds) <= DEAD_SECONDS


def test_four_ranks_name_the_one_that_died(jobs: Jobs, record_property: Any) -> None:
    seconds = []
    for layout in (("--tensor-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2)):
        for culprit in range(4):
            end = jobs.run(*WHILE_BUSY, *layout, fault=f"forward:{culprit}:3:kill", world_size=4)
            assert [code for rank, code in enumerate(end.codes) if rank != culprit] == [78] * 3
            assert is_named(end, culprit), end.statuses
            seconds.append(end.seconds)
    record_property("dead rank of four to job gone", describe_times(seconds))
    assert max(seconds) <= DEAD_SECONDS


def test_hung_ranks(jobs: Jobs, record_property: Any) -> None:
    seconds, unnamed = [], []
    for fault in HANGS:
        _, rank, _, action = fault.split(":")
        culprit = int(rank)
        # Nothing but SIGKILL ends a stopped process, nor one that holds the lock before its own timer: the launcher's.
        cannot_end = culprit if action == "stop" else None
        limit = ("--distributed-timeout-seconds-after-init", HANG_LIMIT)
        end = jobs.start(*WHILE_BUSY, *limit, fault=fault).finish(stopped_rank=cannot_end)
        assert end.codes[1 - culprit] == 78, (fault, end)
        seconds.append(end.seconds)
        if not is_named(end, culprit):
            unnamed.append((fault, end.statuses[1 - culprit]["message"]))
    record_property(f"hung rank (limit {HANG_LIMIT} s) to job gone", describe_times(seconds))
    record_property("hung rank named", f"{len(HANGS) - len(unnamed)} of {len(HANGS)}")
    assert len(unnamed) <= 0.05 * len(HANGS), unnamed
    assert max(seconds) <= HANG_SECONDS


def test_signals_at_any_moment(jobs: Jobs, record_property: Any) -> None:
    """To one rank or to both, once or twice in a row, SIGTERM, SIGINT or SIGUSR1, from the first step on."""
    random_moments, seconds, lost = random.Random(5), [], 0
    calm = jobs.start(*WHILE_BUSY[:-1], 60)
    assert calm.finish().codes == [0, 0]
    expected = read_losses(calm.save)
    for attempt in range(40):
        job = jobs.start(*WHILE_BUSY)
        job.wait_for(lambda job=job: (job.save / "status" / "rank_00001.json").exists())
        time.sleep(random_moments.choice((0.0, 0.3, 1.0, 2.0)) * random_moments.random())
        number = random_moments.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
        for rank in random_moments.choice(((0,), (1,), (0, 1), (0, 1, 0, 1))):
            job.send(number, rank)
        end = job.finish()
        assert end.codes == [75, 75], (attempt, end)
        steps = {(status["step"], status["last_good"], status["cause"]) for status in end.statuses}
        assert len(steps) == 1
        [(step, last_good, cause)] = steps
        assert cause == "preempted"
        lost += step - last_good
        seconds.append(end.seconds)
        if attempt % 8 == 0 and step < 60:
            resumed = jobs.run(*WHILE_BUSY[:-1], 60, "--load", job.save, save=job.save)
            assert resumed.codes == [0, 0]
            assert read_losses(job.save) == expected
    record_property("signal to saved and gone", describe_times(seconds))
    record_property("steps lost", lost)
    assert lost == 0


def read_status(save: Path, rank: int) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((save / "status" / f"rank_{rank:05d}.json").read_text())
    return status


def run_torchrun(jobs: Jobs, save: Path, fault: str, *flags: object) -> tuple[int, float]:
    """The launcher's exit code and the seconds from the fault until it and all its children were gone."""
    fault_time = save.with_suffix(".time")
    inputs = ("--tokenizer-model", jobs.corpus.model, "--data-path", jobs.corpus.prefix, "--save", save)
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [*launcher, "tests/helpers/faulty_pretrain.py", *map(str, (*SMALL, *inputs, *WHILE_BUSY, *flags))]
    environment = {**os.environ, "FAULT": fault, "FAULT_TIME": str(fault_time), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        children: set[psutil.Process] = set()
        while process.poll() is None:
            children.update(psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ())
            time.sleep(0.02)
        psutil.wait_procs(children, timeout=60)
        end = time.time()
        assert not [child for child in children if child.is_running()]
        assert process.stderr is not None
        process.stderr.read()
    return process.returncode, end - float(fault_time.read_text())


def test_a_rank_that_never_comes(jobs: Jobs) -> None:
    environment = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    inputs = ("--tokenizer-model", jobs.corpus.model, "--data-path", jobs.corpus.prefix, "--train-iters", 3)
    flags = (*SMALL, *inputs, "--eval-iters", 0, "--distributed-timeout-minutes", 0.02)
    result = jobs.server.start("pretrain", *flags, environment=environment).finish()
    assert result.code == 78 and "not all 2 processes" in result.err and "1/2" in result.err


def test_under_torchrun(jobs: Jobs, tmp_path: Path, record_property: Any) -> None:
    dead, heard, hung = [], [], []
    for count, fault in enumerate(
        [*(f"{p}:{r}:3:kill" for p, r in product(POINTS[:4], range(2))), "forward:1:3:exit0"]
    ):
        save = tmp_path / f"dead{count}"
        code, seconds = run_torchrun(jobs, save, fault)
        other = 1 - int(fault.split(":")[1])
        status = read_status(save, other)
        assert code == 1 and status["cause"] == "peer", (fault, status)
        assert f"rank {1 - other} (pid" in status["message"]
        dead.append(seconds)
        heard.append(status["time"] - float(save.with_suffix(".time").read_text()))
    for count, action in enumerate(("sleep", "lock", "stop")):
        save = tmp_path / f"hung{count}"
        flags = ("--distributed-timeout-seconds-after-init", HANG_LIMIT)
        code, seconds = run_torchrun(jobs, save, f"data:1:3:{action}", *flags)
        status = read_status(save, 0)
        assert code == 1 and "rank 1 (pid" in status["message"], (action, status)
        hung.append(seconds)
    record_property("dead rank to the other's end under torchrun", describe_times(heard))
    record_property("dead rank to torchrun gone", describe_times(dead))
    record_property(
        "hung rank (sleeping, holding the lock, stopped) to torchrun gone", ", ".join(f"{s:.1f} s" for s in hung)
    )
    assert max(dead) <= DEAD_SECONDS and max(hung) <= HANG_SECONDS
