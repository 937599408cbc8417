"""Real saves of two ranks, cut short anywhere, without paying for imports each time: one process loads all and forks.

The server (`python -m tests.helpers.crash_server`) reads one job per line. It forks a process that forks the two ranks,
so a kill of the whole group leaves the server alone. Ranks that are left over after a peer's death end by themselves,
as under torchrun; the answer says how, and how many operations each of them had done.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.distributed import free_port
from tests.helpers.file_operations import kill_at, kill_self
from tests.helpers.line_server import LineServer

TIMEOUT_SECONDS = 60.0
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What two ranks do: load `start` (None: newest, 0: nothing), and save `end`, or check what was loaded."""

    folder: str
    start: int | None = None
    end: int | None = None
    layout: str = "data"  # what the two ranks are: data, distributed (data, sharded optimizer), tensor or pipeline
    is_async: bool = False
    keep_last: int | None = None
    kill_rank: int | None = None
    kill_at: int = -1
    kills_group: bool = False
    kills_writer: bool = False
    disk_bytes: int | None = None  # the folder is a file system of this size


@dataclass(frozen=True, slots=True)
class RankEnd:
    """How a rank ended; a killed one says nothing of itself."""

    code: int
    iteration: int | None = None  # loaded or saved
    num_operations: int = 0
    error: str | None = None
    files: dict[str, int] | None = None  # left in a file system of limited size
    seconds: float = 0.0  # from the start of the save to its end, however it ended


class CrashServer(LineServer):
    """Runs jobs; use it as a context."""

    def __init__(self) -> None:
        super().__init__("tests.helpers.crash_server", TIMEOUT_SECONDS)

    def run(self, **job: Any) -> list[RankEnd]:
        """Both ranks' ends; all processes of the job are gone."""
        answer = self.ask(asdict(Job(**job)))
        assert answer["left"] == [], "processes outlived their job"
        return [RankEnd(**end) for end in answer["ends"]]


def serve() -> None:
    """Fork until standard input ends."""

    import tests.distributed.test_checkpoint  # noqa: F401

    for line in sys.stdin:
        job = Job(**json.loads(line))
        heard, told = os.pipe()
        if (middle := os.fork()) == 0:
            _run_and_answer(job, told)
        os.close(told)
        with os.fdopen(heard) as pipe:
            ends = pipe.read()
        os.waitpid(middle, 0)
        left = _wait_for_children()
        sys.stdout.write(json.dumps({"ends": json.loads(ends), "left": left}) + "\n")
        sys.stdout.flush()


def _wait_for_children() -> list[str]:
    """Processes of the job that are still there after a while: the server is given those that lost their parent."""
    deadline = time.monotonic() + 10.0
    while (children := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for child in children:
            if child.status() == psutil.STATUS_ZOMBIE and child.ppid() == os.getpid():
                os.waitpid(child.pid, 0)
        time.sleep(0.02)
    return [str(child) for child in children]


def _run_and_answer(job: Job, told: int) -> None:
    try:
        if job.disk_bytes is not None:
            _mount_small_disk(job.folder, job.disk_bytes)
        port = free_port()
        reports = [os.pipe() for _ in range(2)]
        ranks = []
        for rank in range(2):
            if (pid := os.fork()) == 0:
                _be_rank(job, rank, port, reports[rank][1], ranks)
            ranks.append(pid)
        ends = []
        deadline = time.monotonic() + TIMEOUT_SECONDS
        for pid, (heard, said) in zip(ranks, reports, strict=True):
            os.close(said)
            code = _wait(pid, deadline)
            with os.fdopen(heard, "rb") as pipe:
                os.set_blocking(heard, False)
                report = json.loads(pipe.read() or b"{}")
            files = _list_files(job.folder) if job.disk_bytes is not None else None
            ends.append({"code": code, **report, "files": files})
        os.write(told, json.dumps(ends).encode())
    except BaseException:  # noqa: BLE001 (a child must never return into the server)
        traceback.print_exc()
    finally:
        os._exit(0)


def _wait(pid: int, deadline: float) -> int:
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGALRM


def _list_files(folder: str) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}


def _be_rank(job: Job, rank: int, port: int, report: int, peers: list[int]) -> None:
    code, said = 1, {}
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        _work(job, rank, peers, said)
        code = 0
    except BaseException as error:  # noqa: BLE001 (reported)
        said["error"] = f"{type(error).__name__}: {error}"
        code = getattr(error, "exit_code", 1)
    finally:
        os.write(report, json.dumps(said).encode())
        os._exit(code)


def _work(job: Job, rank: int, peers: list[int], said: dict[str, Any]) -> None:
    from datetime import timedelta

    from megatron_metro.config.schema import CheckpointConfig, ParallelConfig
    from megatron_metro.device import activate
    from megatron_metro.parallel.groups import initialise
    from megatron_metro.training.saving import Saver
    from tests.distributed import test_checkpoint as runs

    layouts = {
        "data": runs.DP2, "distributed": runs.DP2_DISTRIBUTED, "tensor": runs.TP2, "pipeline": runs.PP2,
    }  # fmt: skip
    initialise(ParallelConfig(), activate("cpu"), timedelta(seconds=20))
    checkpoint = CheckpointConfig(
        save=job.folder,
        load=job.folder if job.start != 0 else None,
        ckpt_step=job.start or None,
        async_save=job.is_async,
        keep_last=job.keep_last,
    )
    run = runs.Run(layouts[job.layout], runs.FP32, checkpoint)
    if job.start != 0:
        loaded = run.load()
        if loaded is not None:
            said["iteration"] = loaded.iteration
            run.check(runs.torch.float32)
    if job.end is None:
        return
    run.advance(job.end)

    def kill() -> None:
        for peer in peers if job.kills_group else ():
            os.kill(peer, signal.SIGKILL)
        kill_self()

    index = job.kill_at if job.kill_rank == rank else -1
    count = kill_at(Path(job.folder), index, kill, in_child_of=os.getpid() if job.kills_writer else None)
    start = time.monotonic()
    try:
        saver = Saver(run.config, run.groups, {}, lambda iteration: said.update(iteration=iteration))
        saver.save(run.state, run.chunks, run.optimizer)
        saver.wait()
    finally:
        said.update(num_operations=count(), seconds=time.monotonic() - start)


def _mount_small_disk(folder: str, size: int) -> None:
    """A file system of this size in the folder, seen by this process and its children alone; needs no rights."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    _check(libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _check(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={size}".encode()))


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    libc = ctypes.CDLL(None)
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: those that lose their parent become ours
    serve()
