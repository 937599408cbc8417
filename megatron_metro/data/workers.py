"""Processes that answer requests: one request at a time each, results in the order asked for, deaths noticed."""

import multiprocessing
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Literal, TypeVar

from megatron_metro.config.errors import MetroError

Request = TypeVar("Request")
Result = TypeVar("Result")


class WorkerDied(MetroError):
    """A worker process ended without an answer."""


class WorkerPool(Generic[Request, Result]):
    """`num_workers` processes that each call `open_function()` once and what it returns for every request.

    `start_method` fork is for parents without threads; spawn is safe beside gloo, CUDA and OpenMP threads, and imports
    the main module again, which must therefore do nothing on import.
    """

    def __init__(
        self,
        open_function: Callable[[], Callable[[Request], Result]],
        num_workers: int,
        name: str,
        start_method: Literal["fork", "spawn"],
    ) -> None:
        context: Any = multiprocessing.get_context(start_method)
        self._name = name
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        for _ in range(num_workers):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, open_function), daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)

    def __len__(self) -> int:
        return len(self._processes)

    def __enter__(self) -> "WorkerPool[Request, Result]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids, in the order of the workers."""
        return [process.pid for process in self._processes]

    def submit(self, worker: int, request: Request) -> None:
        """Ask a worker that has no open request."""
        try:
            self._connections[worker].send(request)
        except OSError:
            self._raise_death(worker)

    def result(self, worker: int) -> Result:
        """Wait for a worker's answer; raises what it raised if that is a MetroError, WorkerDied if it died."""
        connection = self._connections[worker]
        if connection not in wait([connection, self._processes[worker].sentinel]):
            self._raise_death(worker)
        try:
            answer = connection.recv()
        except (EOFError, OSError):
            self._raise_death(worker)
        if isinstance(answer, MetroError):
            raise answer
        return answer

    def close(self) -> None:
        """End all workers, busy or not."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._connections, self._processes = [], []

    def _raise_death(self, worker: int) -> None:
        process = self._processes[worker]
        process.join()
        code = process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = "; out of memory?" if code == -signal.SIGKILL else ""
        raise WorkerDied(f"{self._name} worker {worker} (pid {process.pid}) {how}{hint}")


def _serve(connection: Connection, open_function: Callable[[], Callable[[Any], Any]]) -> None:
    """Answer until the other end closes, which also happens when the parent is killed."""
    # These reach the whole group, and the parent decides: it may want to save, for which it needs no worker to die.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    try:
        function = open_function()
        while True:
            connection.send(function(connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        sys.exit(0)
    except MetroError as error:
        connection.send(error)
