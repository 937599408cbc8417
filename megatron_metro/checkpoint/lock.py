"""One job per --save. Files only."""

import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path

from megatron_metro.config.errors import CheckpointError, StorageError

LOCK = ".lock"


class SaveLock:
    """The right to write into a folder of checkpoints, held by one process of a job; readers need none.

    The kernel gives it back when the process ends, however it ends, so there is no stale lock to judge. What the file
    says of its holder only serves the message. It stays where it is: to remove it would race with the next holder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Raise CheckpointError, naming the holder, when another job has it, StorageError where there are no locks."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise StorageError(f"--save {self._path.parent}: cannot be locked ({error.strerror})") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _describe_self(), 0)
        except BlockingIOError:
            holder = _describe_holder(os.pread(descriptor, 1000, 0))
            os.close(descriptor)
            raise CheckpointError(
                f"--save {self._path.parent}: in use by {holder}; wait for it, end it, or save into another folder"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise StorageError(
                f"--save {self._path.parent}: cannot be locked ({error.strerror}); choose a file system with locks"
            ) from error
        self._descriptor = descriptor

    def close(self) -> None:
        """Give it back, where it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _describe_self() -> bytes:
    now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}).encode()


def _describe_holder(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f"process {int(holder['pid'])} on host {holder['host']!r} since {holder['since']!r}"
    except (ValueError, KeyError, TypeError):
        return "another process"
