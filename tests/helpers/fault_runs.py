"""Jobs of several real processes that something goes wrong in: start, watch, judge, and look for what is left over."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.corpus import Corpus
from tests.helpers.distributed import free_port
from tests.helpers.tool_server import StartedTool, ToolRun, ToolServer

SMALL = (
    "--preset", "metro-tiny", "--vocab-extra-ids", 64, "--encoder-seq-length", 32, "--lr-warmup-iters", 0,
    "--hidden-dropout", 0.1, "--log-interval", 1,
)  # fmt: skip
FAULTY = "../tests/helpers/faulty_pretrain"
WAIT_SECONDS = 100.0
LOOPBACK = ("127.", "::1", "::ffff:127.")


@dataclass(frozen=True, kw_only=True)
class JobEnd:
    """How all ranks of a job ended."""

    ranks: list[ToolRun]
    statuses: list[dict[str, Any]]  # what each rank's file says
    seconds: float  # from the fault until no process was left

    def error_of(self, rank: int) -> str:
        """The one line in which a rank says why it ended; torch may warn beside it of connections that broke."""
        lines = self.ranks[rank].err.splitlines()
        [found] = [line for line in lines if line.startswith("error: ")]
        assert "Traceback (most recent call last)" not in lines, self.ranks[rank].err
        return found

    @property
    def codes(self) -> list[int | None]:
        return [rank.code for rank in self.ranks]

    @property
    def causes(self) -> list[str]:
        return [status["cause"] for status in self.statuses]


class Jobs:
    """Starts jobs on one text; each has a folder of its own."""

    def __init__(self, server: ToolServer, corpus: Corpus, folder: Path) -> None:
        self.server, self.corpus, self.folder = server, corpus, folder
        self._count = 0

    def start(
        self, *flags: object, fault: str | None = None, world_size: int = 2, save: Path | None = None
    ) -> "StartedJob":
        """A job of `world_size` processes, as torchrun would start it."""
        self._count += 1
        save = save or self.folder / f"job{self._count}"
        fault_time = self.folder / f"fault{self._count}"
        environment = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "FAULT_TIME": str(fault_time),
            **({"FAULT": fault} if fault else {}),
        }
        inputs = ("--tokenizer-model", self.corpus.model, "--data-path", self.corpus.prefix, "--save", save)
        started = [
            self.server.start(
                FAULTY if fault else "pretrain",
                *SMALL,
                *inputs,
                *flags,
                *(() if "--eval-iters" in flags else ("--eval-iters", 0)),
                environment={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world_size)
        ]
        return StartedJob(started, save, fault_time, int(environment["MASTER_PORT"]))

    def run(self, *flags: object, **options: Any) -> JobEnd:
        """Start and wait."""
        return self.start(*flags, **options).finish()


class StartedJob:
    """A job that runs."""

    def __init__(self, started: list[StartedTool], save: Path, fault_time: Path, port: int) -> None:
        self.save, self._port = save, port
        self._started, self._fault_time = started, fault_time

    @property
    def pids(self) -> list[int]:
        return [tool.pid for tool in self._started]

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Until something is so; raises TimeoutError."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the job in {self.save} did not come so far")
            time.sleep(0.02)

    def count_steps(self) -> int:
        """Logged ones."""
        path = self.save / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def send(self, number: signal.Signals, rank: int) -> None:
        """Send a signal and take its time as the fault's."""
        self._fault_time.write_text(str(time.time()))
        os.kill(self.pids[rank], number)

    def finish(self, *, stopped_rank: int | None = None) -> JobEnd:
        """Wait for the end of all ranks; `stopped_rank` is one that cannot end and is killed after the others."""
        order = [rank for rank in range(len(self._started)) if rank != stopped_rank]
        ends = {rank: self._started[rank].finish() for rank in order}
        end = time.time()
        if stopped_rank is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[stopped_rank], signal.SIGKILL)
            ends[stopped_rank] = self._started[stopped_rank].finish()
        fault_time = float(self._fault_time.read_text()) if self._fault_time.exists() else end
        folder = self.save / "status"
        self.assert_nothing_is_left()
        return JobEnd(
            ranks=[ends[rank] for rank in range(len(ends))],
            statuses=[json.loads((folder / f"rank_{rank:05d}.json").read_text()) for rank in range(len(ends))],
            seconds=end - fault_time,
        )

    def assert_nothing_is_left(self) -> None:
        """No process of the job, no temporary file; a checkpoint that was being written goes with the next start."""
        assert not [pid for pid in self.pids if psutil.pid_exists(pid)]
        found = [str(path) for path in self.save.rglob("*") if path.suffix == ".tmp"]
        assert found == []

    def list_foreign_sockets(self) -> list[str]:
        """Addresses other than the loopback's that a process of the job listens on or is connected to.

        But for torch's rendezvous, which listens on all of them.
        """
        found = []
        for process in _with_children(self.pids):
            for connection in process.net_connections(kind="inet"):
                if connection.laddr.port == self._port:
                    continue
                addresses = [address.ip for address in (connection.laddr, connection.raddr) if address]
                found += [address for address in addresses if not address.startswith(LOOPBACK)]
        return found


def _with_children(pids: list[int]) -> Iterator[psutil.Process]:
    for pid in pids:
        process = psutil.Process(pid)
        yield process
        yield from process.children(recursive=True)


def read_losses(save: Path) -> dict[int, tuple[float, ...]]:
    """What the log says of each training step, but for its time."""
    names = ("lm_loss", "mlm_loss", "rtd_loss", "grad_norm", "lr", "consumed_samples")
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: tuple(line[name] for name in names) for line in lines if line["split"] == "train"}
