"""The test suite's own worker processes: results, errors, crashes and hangs are reported, and nobody is left over."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.helpers.distributed import WorkerError, WorkerPool, run_distributed


def tell_rank(offset: int) -> tuple[int, int, str]:
    return int(os.environ["RANK"]) + offset, os.getpid(), os.environ["OMP_NUM_THREADS"]


def raise_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("nothing works")
    time.sleep(60)


def die_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        os._exit(9)
    time.sleep(60)


def hang_in_a_child() -> None:
    """A hanging worker that has itself started a process."""
    subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"], check=False)


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def strange_descendants() -> set[int]:
    """Living processes under this one, other than the resource tracker that Python keeps."""
    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if is_running(child.pid) and "resource_tracker" not in str(child.cmdline())}


FAILURES: list[tuple[Callable[[], None], float, str]] = [
    (raise_on_rank_one, 30.0, "rank 1: Traceback.*nothing works"),
    (die_on_rank_one, 30.0, "rank 1: died with exit code 9"),
    (hang_in_a_child, 3.0, "rank 0: no answer.*hang_in_a_child.*rank 1: no answer"),
]


def test_failures_are_reported_and_nobody_is_left_over() -> None:
    before = strange_descendants()
    pool = WorkerPool(2)
    for function, timeout, reason in FAILURES:
        # A pool that failed starts afresh.
        results = pool.run(tell_rank, 10)
        assert [(value, threads) for value, _, threads in results] == [(10, "1"), (11, "1")]
        with pytest.raises(WorkerError, match=f"(?s){reason}"):
            pool.run(function, timeout=timeout)
        assert not any(is_running(pid) for _, pid, _ in results)
        assert strange_descendants() == before


def test_processes_end_with_their_only_run() -> None:
    before = strange_descendants()
    assert [value for value, _, _ in run_distributed(tell_rank, 1, 5)] == [5]
    assert strange_descendants() == before


KILLED_PROGRAM = """
import os, sys, threading, time
from tests.distributed.test_workers import hang_in_a_child, tell_rank
from tests.helpers.distributed import WorkerPool

if __name__ == "__main__":
    pool = WorkerPool(2)
    print(*[pid for _, pid, _ in pool.run(tell_rank, 0)], flush=True)
    threading.Timer(1.0, os._exit, [1]).start()
    pool.run(hang_in_a_child)
"""


def test_workers_do_not_outlive_a_killed_test_run(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(KILLED_PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    pids = [int(pid) for pid in result.stdout.split()]
    assert len(pids) == 2, result.stderr
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in pids)
