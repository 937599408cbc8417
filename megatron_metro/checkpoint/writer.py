"""Writes tensors into a file that is hashed meanwhile, here or in a process of its own. One rank's part of a step."""

import gc
import hashlib
import json
import os
import select
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO, NoReturn, Self, cast

import numpy as np
import torch
from torch import Tensor

from megatron_metro.checkpoint.manifest import FileRecord
from megatron_metro.config.errors import StorageError, first_line

_PARALLEL_BYTES = 1 << 20  # smaller pieces are copied faster than another thread is woken
_WAITING_BYTES = 1 << 28  # that wait for the hash, at most; a piece that is larger waits for all others
_PARENT_CHECK_SECONDS = 0.2
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenFile:
    """A file that is on the disk."""

    record: FileRecord
    spans: Sequence[tuple[int, int]]  # first byte and number of bytes of each tensor


def write_tensors(path: Path, tensors: Iterable[Tensor]) -> WrittenFile:
    """Write a new file of tensors in torch's format, one after another, and synchronise it. Raises OSError."""
    spans = []
    with open(path, "xb", buffering=0) as file, _Digest() as digest:
        hashing = _HashingFile(file, digest)
        for tensor in tensors:
            start = hashing.size
            hashing.tensor = to_host(tensor)
            torch.save(hashing.tensor, cast(IO[bytes], hashing))  # it asks for write and flush only
            hashing.check()
            spans.append((start, hashing.size - start))
        os.fsync(file.fileno())
        return WrittenFile(record=FileRecord(size=hashing.size, sha256=digest.hexdigest()), spans=spans)


def to_host(tensor: Tensor, *, copy: bool = False) -> Tensor:
    """The tensor in host memory and in a storage that holds nothing else; a copy where it is not, or on demand."""
    host = tensor.detach().cpu()
    is_alone = host.untyped_storage().nbytes() == host.nbytes
    return host if is_alone and not (copy and host.data_ptr() == tensor.data_ptr()) else host.clone()


class _Digest:
    """SHA-256 in a thread of its own, so that writing and synchronising go on meanwhile. Use it as a context."""

    def __init__(self) -> None:
        self._sha256, self._pool = hashlib.sha256(), ThreadPoolExecutor(1)
        self._small = bytearray()
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._waiting_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, view: memoryview) -> None:
        """Bytes that may change as soon as this returns."""
        self._small += view
        if len(self._small) >= _PARALLEL_BYTES:
            self._submit(self._take_small())

    def add_tensor(self, view: memoryview, owner: Tensor) -> None:
        """Bytes that stay as they are while `owner` lives."""
        self._submit(self._take_small())
        self._submit(view, owner)

    def hexdigest(self) -> str:
        """Of all bytes in the order they were added."""
        self._submit(self._take_small())
        self._wait(0)
        return self._sha256.hexdigest()

    def _take_small(self) -> memoryview:
        taken, self._small = self._small, bytearray()
        return memoryview(taken)

    def _submit(self, view: memoryview, owner: Tensor | None = None) -> None:
        self._wait(_WAITING_BYTES - view.nbytes)
        self._waiting.append((self._pool.submit(self._update, view, owner), view.nbytes))
        self._waiting_bytes += view.nbytes

    def _update(self, view: memoryview, _owner: Tensor | None) -> None:
        self._sha256.update(view)

    def _wait(self, num_bytes: int) -> None:
        """Until no more than this many bytes wait; what waits is copies of a device's tensors, which take memory."""
        while self._waiting and self._waiting_bytes > num_bytes:
            done, size = self._waiting.popleft()
            done.result()
            self._waiting_bytes -= size


class _HashingFile:
    """What torch.save writes `tensor` into."""

    def __init__(self, file: FileIO, digest: _Digest) -> None:
        self._file, self._digest = file, digest
        self._error: OSError | None = None
        self.tensor = torch.empty(0)
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        """After an error of the file system bytes are only counted: torch's own writer does not survive one."""
        view = memoryview(data).cast("B")
        if self._error is None:
            if view.nbytes >= _PARALLEL_BYTES and self._is_of_tensor(view):
                self._digest.add_tensor(view, self.tensor)
            else:
                self._digest.add(view)
            self._write_all(view)
        self.size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Nothing is buffered."""

    def check(self) -> None:
        """Raise the error of an earlier write."""
        if self._error is not None:
            raise self._error

    def _is_of_tensor(self, view: memoryview) -> bool:
        storage = self.tensor.untyped_storage()
        offset = int(np.frombuffer(view, np.uint8).ctypes.data) - storage.data_ptr()
        return 0 <= offset <= storage.nbytes() - view.nbytes

    def _write_all(self, view: memoryview) -> None:
        try:
            while view.nbytes:
                view = view[self._file.write(view) :]
        except OSError as error:
            self._error = error


class WriterProcess:
    """A child that writes tensors which lie in host memory, while its parent goes on.

    It is forked: it sees the tensors as they are now at no cost, whatever becomes of them afterwards, and does nothing
    but write. It lives no longer than its parent, and has no children. All methods raise StorageError when it has died,
    failed or taken more than `timeout` seconds; it is gone then.
    """

    def __init__(self, path: Path, tensors: Sequence[Tensor], timeout: float) -> None:
        assert all(tensor.device.type == "cpu" for tensor in tensors), "a forked process has no other device"
        self._path, self._timeout, self._start = path, timeout, time.monotonic()
        self._answer = b""
        parent = os.getpid()
        self._pipe, write_end = os.pipe()
        try:
            with warnings.catch_warnings():
                # Threads are not forked. The child needs none of ours, and one that hangs is noticed like a slow one.
                warnings.filterwarnings("ignore", ".*use of fork.. may lead to deadlocks", DeprecationWarning)
                self.pid = os.fork()
        except OSError as error:
            os.close(self._pipe)
            raise StorageError(f"{path}: no process to write it ({first_line(error)})") from error
        finally:
            if os.getpid() == parent:
                os.close(write_end)
        if self.pid == 0:
            _be_writer(path, tensors, write_end, parent)
        os.set_blocking(self._pipe, False)

    def poll(self) -> WrittenFile | None:
        """What it has written; None while it is at work."""
        return self._look(0.0)

    def wait(self) -> WrittenFile:
        """Block until it has written all, within its time."""
        while (written := self._look(1.0)) is None:
            pass
        return written

    def close(self) -> None:
        """End it, at work or not."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self._reap()

    def _look(self, seconds: float) -> WrittenFile | None:
        assert self.pid, "an ended writer is not asked again"
        ready = select.poll()
        ready.register(self._pipe, select.POLLIN)
        ready.poll(int(seconds * 1000))
        try:
            while piece := os.read(self._pipe, 1 << 16):
                self._answer += piece
        except BlockingIOError:
            if time.monotonic() - self._start <= self._timeout:
                return None
            pid = self.pid
            self.close()
            raise StorageError(
                f"{self._path}: its writer (pid {pid}) has not finished within --async-save-timeout {self._timeout:g} "
                "seconds; give it more time"
            ) from None
        return self._read_answer()

    def _read_answer(self) -> WrittenFile:
        pid, code = self.pid, self._reap()
        if code < 0:
            hint = "; is the host out of memory?" if code == -signal.SIGKILL else ""
            raise StorageError(f"{self._path}: its writer (pid {pid}) was killed by signal {-code}{hint}")
        try:
            answer = json.loads(self._answer)
        except ValueError:
            raise StorageError(f"{self._path}: its writer (pid {pid}) ended with exit code {code}") from None
        if "error" in answer:
            raise StorageError(answer["error"])
        return WrittenFile(record=FileRecord(**answer["record"]), spans=[tuple(span) for span in answer["spans"]])

    def _reap(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        os.close(self._pipe)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)


def _be_writer(path: Path, tensors: Sequence[Tensor], write_end: int, parent: int) -> NoReturn:
    """The child: write, answer, end; never returns. The parent's descriptors and objects are left alone."""
    try:
        gc.disable()
        signal.set_wakeup_fd(-1)
        for number in _IGNORED_SIGNALS:  # they are meant for the parent, which waits for us or ends us
            signal.signal(number, signal.SIG_IGN)
        os.closerange(3, write_end)  # sockets to other ranks and the lock of --save end with the parent alone
        os.closerange(write_end + 1, os.sysconf("SC_OPEN_MAX"))
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        try:
            written = write_tensors(path, tensors)
            record = {"size": written.record.size, "sha256": written.record.sha256}
            answer = {"record": record, "spans": list(written.spans)}
        except Exception as error:  # noqa: BLE001 (the parent reports it)
            answer = {"error": first_line(error)}
        rest = memoryview(json.dumps(answer).encode())
        while rest.nbytes:
            rest = rest[os.write(write_end, rest) :]
    finally:
        os._exit(0)


def _end_with(parent: int) -> NoReturn:
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    os._exit(1)
