"""A connection beside the collectives: small texts by name in the job's store, for threads that watch."""

import os
import socket
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import psutil
import torch.distributed as dist

from megatron_metro.parallel.agreement import gather_on_all

_CONNECTION_WORDS = ("gloo", "Connection ", "Broken pipe", "NCCL", "Socket", "socket", "recvValue", "sendBytes")


class Process(NamedTuple):
    """A process as others can find it."""

    machine: str  # host name and process namespace: where the id means something
    host: str
    pid: int
    started: float

    @staticmethod
    def own() -> "Process":
        """This one."""
        namespace = Path("/proc/self/ns/pid")
        space = str(os.stat(namespace).st_ino) if namespace.exists() else ""
        host = socket.gethostname()
        return Process(f"{host} {space}", host, os.getpid(), psutil.Process().create_time())

    def is_alive(self) -> bool:
        """Whether it runs, on this machine; one that has ended and is not yet collected by its parent does not."""
        try:
            process = psutil.Process(self.pid)
            has_same_start = abs(process.create_time() - self.started) < 1.0
            return has_same_start and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return False


class SideChannel:
    """This rank's own connection to the job's store; building it is collective.

    All methods raise ConnectionError when the store has gone, and may block as long as it does not answer.
    """

    def __init__(self, timeout: timedelta) -> None:
        store = dist.distributed_c10d._get_default_store()
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        assert isinstance(store, dist.TCPStore), "torchrun's rendezvous"
        # The main thread holds the store's own connection while it waits there.
        self._store = dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False, timeout=timeout)
        attempt = str(uuid.uuid4()) if dist.get_rank() == 0 else ""
        answers = gather_on_all((attempt, Process.own()))
        # torchrun's store outlives an attempt of the job.
        self._prefix = f"watch/{answers[0][0]}/"
        self.processes = [process for _, process in answers]

    def put(self, name: str, text: str) -> None:
        """Set a text; not empty."""
        try:
            self._store.set(self._prefix + name, text)
        except (dist.DistError, RuntimeError) as error:
            raise ConnectionError(str(error)) from error

    def put_first(self, name: str, text: str) -> str:
        """Set a text that nobody has set; returns what is there then."""
        try:
            found: bytes = self._store.compare_set(self._prefix + name, "", text)
        except (dist.DistError, RuntimeError) as error:
            raise ConnectionError(str(error)) from error
        return found.decode()

    def get(self, names: Sequence[str]) -> list[str]:
        """Texts by name; empty where there is none yet."""
        try:
            return [self._get(self._prefix + name) for name in names]
        except (dist.DistError, RuntimeError) as error:
            raise ConnectionError(str(error)) from error

    def _get(self, name: str) -> str:
        return self._store.get(name).decode() if self._store.check([name]) else ""


def is_connection_error(error: BaseException | None) -> bool:
    """Whether this is what a collective raises when another rank has gone, or has been waited for too long."""
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _CONNECTION_WORDS)
