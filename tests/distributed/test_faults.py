"""Real jobs of two processes in which a rank is stopped, dies, hangs or errs. The full tier has the large counts."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_metro.training.stopping import SAME_SIGNAL_SECONDS
from tests.helpers.corpus import build_corpus
from tests.helpers.fault_runs import Jobs, read_losses
from tests.helpers.tool_server import ToolServer

# Bounds that hold beside other work on the same cores; the full tier measures the figures.
DEAD_SECONDS = 30.0
HANG_LIMIT, HANG_SECONDS = 8, 43.0


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    corpus = build_corpus(tmp_path_factory.mktemp("corpus"))
    with ToolServer(tmp_path_factory.mktemp("runs")) as server:
        yield Jobs(server, corpus, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def calm(jobs: Jobs) -> dict[int, tuple[float, ...]]:
    """The losses of a run without faults."""
    job = jobs.start("--train-iters", 9)
    end = job.finish()
    assert (end.codes, end.causes) == ([0, 0], ["done", "done"])
    return read_losses(job.save)


def test_a_signal_to_one_rank_saves_and_stops_all_and_nothing_is_lost(
    jobs: Jobs, calm: dict[int, tuple[float, ...]]
) -> None:
    stopped = jobs.start("--train-iters", 9, fault="forward:1:4:term")
    end = stopped.finish()
    assert (end.codes, end.causes) == ([75, 75], ["preempted", "preempted"])
    for rank, status in enumerate(end.statuses):
        assert (status["rank"], status["step"], status["last_good"], status["exit"]) == (rank, 5, 5, 75)
        assert "SIGTERM" in end.error_of(rank) and "iteration 5 is saved" in end.error_of(rank)
    resumed = jobs.run("--train-iters", 9, "--load", stopped.save, save=stopped.save)
    assert (resumed.codes, resumed.statuses[0]["last_good"]) == ([0, 0], 9)
    assert read_losses(stopped.save) == calm
    again = jobs.start("--train-iters", 9, "--load", stopped.save)
    end = again.finish()
    assert end.codes == [0, 0] and "nothing is trained and nothing is saved" in end.ranks[1].out
    assert list(again.save.glob("iter_*")) == []


@pytest.mark.parametrize(
    ("fault", "code"), [("forward:1:3:kill", -9), ("optimizer:0:3:kill", -9), ("backward:1:3:exit0", 0)]
)
def test_a_dead_rank_ends_the_job_and_is_named(jobs: Jobs, fault: str, code: int) -> None:
    end = jobs.run("--train-iters", 1000, fault=fault)
    dead = int(fault.split(":")[1])
    assert end.codes == [code if rank == dead else 78 for rank in range(2)]
    other = end.statuses[1 - dead]
    assert (other["cause"], other["step"], other["exit"]) == ("peer", 3, 78)
    assert f"rank {dead} (pid" in other["message"] and other["message"] in end.error_of(1 - dead)
    assert end.seconds < DEAD_SECONDS


@pytest.mark.parametrize(
    ("fault", "code", "cause", "words"),
    [
        ("data:1:3:data-error", 65, "data", "text.bin is damaged"),
        ("report:1:3:disk-full", 74, "storage", "No space left on device"),
        ("forward:0:3:no-memory", 71, "memory", ", or give --recompute-granularity full"),
        ("grad-sync:1:3:bug", 70, "bug", "KeyError: 'a bug'"),
    ],
)
def test_an_error_on_one_rank_ends_all_and_is_named(jobs: Jobs, fault: str, code: int, cause: str, words: str) -> None:
    end = jobs.run("--train-iters", 1000, fault=fault)
    culprit = int(fault.split(":")[1])
    assert end.codes == [code if rank == culprit else 78 for rank in range(2)]
    assert end.causes == [cause if rank == culprit else "peer" for rank in range(2)]
    assert all(words in status["message"] for status in end.statuses)
    assert f"rank {culprit} ended with exit code {code}" in end.error_of(1 - culprit)
    assert end.seconds < DEAD_SECONDS


@pytest.mark.parametrize("action", ["sleep", "stop"])
def test_a_hung_rank_ends_the_job_and_is_named(jobs: Jobs, action: str) -> None:
    job = jobs.start(
        "--train-iters", 1000, "--distributed-timeout-seconds-after-init", HANG_LIMIT, fault=f"data:1:3:{action}"
    )
    job.wait_for(lambda: job.count_steps() >= 1)
    assert job.list_foreign_sockets() == []
    end = job.finish(stopped_rank=1 if action == "stop" else None)
    assert end.codes == [78, -9 if action == "stop" else 78]
    # What a stopped process showed last is up to half a second old.
    what = "gave no sign of life" if action == "stop" else "phase data after iteration 3) did not come"
    assert "rank 1 (pid" in end.error_of(0) and what in end.error_of(0)
    assert "all_reduce" in (job.save / "status" / "stacks_00000.txt").read_text()
    if action == "sleep":
        assert "in _microbatches" in (job.save / "status" / "stacks_00001.txt").read_text()
    assert HANG_LIMIT - 2 < end.seconds < HANG_SECONDS


def test_a_slow_rank_is_named_and_changes_nothing(jobs: Jobs, calm: dict[int, tuple[float, ...]]) -> None:
    slow = jobs.start("--train-iters", 9, fault="data:1:1:slow")
    end = slow.finish()
    assert end.codes == [0, 0]
    assert "WARNING: rank 1 is slow" in end.ranks[1].out
    assert "rank 0 is slow" not in end.ranks[1].out
    assert read_losses(slow.save) == calm


def test_the_second_signal_ends_at_once(jobs: Jobs) -> None:
    # The other rank's main thread waits for a rank that sleeps: only a thread of its own can hear the signals.
    job = jobs.start("--train-iters", 1000, fault="data:1:2:sleep")
    job.wait_for(lambda: (job.save / "status").exists() and job.count_steps() >= 2)
    job.send(signal.SIGINT, 0)
    time.sleep(2 * SAME_SIGNAL_SECONDS)
    job.send(signal.SIGINT, 0)
    end = job.finish()
    assert end.codes == [130, 78] and end.causes == ["interrupted", "peer"]
    assert "a second SIGINT" in end.error_of(0)
    assert list(Path(job.save).glob("iter_*")) == []
