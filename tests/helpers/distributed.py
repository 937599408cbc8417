"""Run functions on several gloo processes of this machine: `run_distributed` once, `WorkerPool` many times.

Workers are spawned, import the function by name, and are watched: a crash or a time-out ends all of them and is
reported with every rank's traceback. Arguments and results travel by pickle; functions live at module level.
"""

import atexit
import contextlib
import faulthandler
import gc
import os
import random
import signal
import socket
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from typing import Any

import psutil

DEFAULT_TIMEOUT_SECONDS = 120.0
START_TIMEOUT_SECONDS = 240.0
_PORTS = (12_000, 32_000)
_SPAWN = get_context("spawn")


class WorkerError(RuntimeError):
    """One or more workers raised, died or did not answer in time; the message holds what each rank said."""


@dataclass(frozen=True, slots=True)
class _Answer:
    value: Any = None
    error: str | None = None


class WorkerPool:
    """`world_size` living processes joined in one gloo group; a failed pool starts afresh on its next `run`.

    A worker activates the CPU device and joins torch.distributed with one-way layout TP=PP=1; functions take up other
    layouts with `megatron_metro.parallel.groups.reinitialise`. The first tier keeps to four processes; the full tier
    raises `max_world_size`.
    """

    def __init__(self, world_size: int, *, max_world_size: int = 4) -> None:
        assert 1 <= world_size <= max_world_size, "tests share two cores"
        self.world_size = world_size
        self._processes: list[BaseProcess] = []
        self._pipes: list[connection.Connection] = []
        self._stack_files: list[str] = []

    @property
    def pids(self) -> list[int]:
        """Process ids of the living workers, in rank order."""
        return [process.pid for process in self._processes if process.pid is not None]

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> list[Any]:
        """`function(*args)` on every worker; the results in rank order. Raises WorkerError."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._collect_all(function.__qualname__, timeout)

    def close(self) -> None:
        """End the workers: they are asked first, and killed when they do not heed within seconds."""
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue  # already gone
        deadline = time.monotonic() + 5.0
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self._kill()
        for pipe in self._pipes:
            pipe.close()
        for path in self._stack_files:
            os.unlink(path)
        self._processes, self._pipes, self._stack_files = [], [], []
        atexit.unregister(self.close)

    def _kill(self) -> None:
        """Kill the workers that live, and what they started (core's checkpoint writer has processes of its own)."""
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                _kill_children(process.pid)
                process.kill()
                process.join()

    def _start(self) -> None:
        # Workers are no daemons, since daemons may not start processes; the interpreter would wait for them for ever.
        atexit.register(self.close)
        port = free_port()
        for rank in range(self.world_size):
            here, there = _SPAWN.Pipe()
            handle, stack_file = tempfile.mkstemp(prefix="stack-")
            os.close(handle)
            process = _SPAWN.Process(
                target=_serve, args=(there, rank, self.world_size, port, stack_file), name=f"rank{rank}"
            )
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
            self._stack_files.append(stack_file)
        # Importing Megatron-Core takes seconds, on a busy machine minutes: no part of a function's own time.
        self._collect_all("start", START_TIMEOUT_SECONDS)

    def _collect_all(self, what: str, timeout: float) -> list[Any]:
        answers = self._collect(time.monotonic() + timeout)
        if any(answer is None or answer.error for answer in answers):
            message = self._describe(what, answers, timeout)
            self._kill()
            self.close()
            raise WorkerError(message)
        return [answer.value for answer in answers if answer is not None]

    def _collect(self, deadline: float) -> list[_Answer | None]:
        """One answer per rank; None where none came. Stops early once a rank failed: its peers would wait for it."""
        answers: list[_Answer | None] = [None] * self.world_size
        waiting = dict(enumerate(self._pipes))
        while waiting and time.monotonic() < deadline:
            ready = connection.wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                answers[rank] = self._receive(rank)
                del waiting[rank]
                if answers[rank].error:  # type: ignore[union-attr]
                    deadline = min(deadline, time.monotonic() + 2.0)
        return answers

    def _receive(self, rank: int) -> _Answer:
        try:
            answer: _Answer = self._pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(5.0)
            return _Answer(error=f"died with exit code {self._processes[rank].exitcode}")
        return answer

    def _describe(self, what: str, answers: Sequence[_Answer | None], timeout: float) -> str:
        lines = [f"{what} failed on {self.world_size} processes"]
        for rank, answer in enumerate(answers):
            if answer is None:
                lines.append(f"--- rank {rank}: no answer (limit {timeout:g} s); it was at\n{self._stack(rank)}")
            elif answer.error:
                lines.append(f"--- rank {rank}: {answer.error}")
            else:
                lines.append(f"--- rank {rank}: finished")
        return "\n".join(lines)

    def _stack(self, rank: int) -> str:
        """Python stack of a silent worker, which writes it to its file on SIGUSR1."""
        process = self._processes[rank]
        if not process.is_alive() or process.pid is None:
            return f"exit code {process.exitcode}"
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.3)
        with open(self._stack_files[rank]) as file:
            return file.read()


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = DEFAULT_TIMEOUT_SECONDS
) -> list[Any]:
    """`function(*args)` on fresh processes that end afterwards; the results in rank order. Raises WorkerError."""
    pool = WorkerPool(world_size)
    try:
        return pool.run(function, *args, timeout=timeout)
    finally:
        pool.close()


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to connections between now and its use."""
    while True:
        port = random.SystemRandom().randrange(*_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def _serve(pipe: connection.Connection, rank: int, world_size: int, port: int, stack_file: str) -> None:
    """A worker's life: join the others, then answer one function after another until told to stop."""
    # What Megatron-Core warns of on import (no Transformer Engine, no Apex) is no news on a CPU.
    warnings.simplefilter("ignore", UserWarning)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(stack_file, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        try:
            groups = _join(rank, world_size, port)
        except Exception:  # noqa: BLE001 (whatever it is, the test process reports it)
            pipe.send(_Answer(error=traceback.format_exc()))
            return
        gc.collect()
        gc.freeze()  # what has been imported stays: collections need not look at it
        pipe.send(_Answer())  # ready
        try:
            while (job := _next_job(pipe)) is not None:
                pipe.send(_answer(*job))
                # Closed process groups keep dozens of threads until the cycles that a training engine is part of go.
                gc.collect()
        finally:
            groups.destroy()


def _end_with_parent() -> None:
    """No worker outlives the test process, even one that hangs when that process is killed."""
    parent = parent_process()
    assert parent is not None, "workers are spawned"
    connection.wait([parent.sentinel])
    _kill_children(os.getpid())
    os._exit(1)


def _kill_children(pid: int) -> None:
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _join(rank: int, world_size: int, port: int) -> Any:
    # Thread counts are read when torch is imported, so the environment is set before (and torch imported after).
    os.environ.update(
        OMP_NUM_THREADS="1",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from datetime import timedelta

    import torch

    from megatron_metro.config.schema import ParallelConfig
    from megatron_metro.device import activate
    from megatron_metro.parallel.groups import initialise

    torch.set_num_threads(1)
    return initialise(ParallelConfig(), activate("cpu"), timedelta(minutes=5))


def _next_job(pipe: connection.Connection) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    try:
        job: tuple[Callable[..., Any], tuple[Any, ...]] | None = pipe.recv()
    except (EOFError, OSError):
        return None  # the test process is gone
    return job


def _answer(function: Callable[..., Any], args: tuple[Any, ...]) -> _Answer:
    try:
        return _Answer(value=function(*args))
    except Exception:  # noqa: BLE001 (whatever it is, the test process reports it)
        return _Answer(error=traceback.format_exc())
