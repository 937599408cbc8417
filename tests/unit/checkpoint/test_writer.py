"""Files of tensors: read back by torch, hashed as they are, written by a process that may die, hang or be orphaned."""

import contextlib
import errno
import hashlib
import io
import os
import resource
import signal
import time

import psutil
import pytest
import torch

from megatron_metro.checkpoint.writer import WriterProcess, to_host, write_tensors
from megatron_metro.config.errors import StorageError

# One above and some below the size from which pieces are hashed in parallel.
TENSORS = [torch.randn(700, 500), torch.randn(3, 5).bfloat16(), torch.tensor(7), torch.arange(10)[2:5], torch.empty(0)]
FOREVER = 600.0


def check(path, written, tensors=TENSORS):
    content = path.read_bytes()
    assert written.record.size == len(content)
    assert written.record.sha256 == hashlib.sha256(content).hexdigest()
    for (start, length), tensor in zip(written.spans, tensors, strict=True):
        found = torch.load(io.BytesIO(content[start : start + length]), weights_only=True)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    assert sum(length for _, length in written.spans) == len(content)


def test_what_is_written_is_read_back_and_hashed(tmp_path):
    check(tmp_path / "file", write_tensors(tmp_path / "file", TENSORS))
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "file", TENSORS)


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path):
    whole = torch.randn(1_000_000)
    written = write_tensors(tmp_path / "file", [whole[5:10]])
    assert written.record.size < 10_000
    assert to_host(whole) is not whole and to_host(whole).data_ptr() == whole.data_ptr()
    assert to_host(whole, copy=True).data_ptr() != whole.data_ptr()


@contextlib.contextmanager
def largest_file(size):
    """As `ulimit -f`, in bytes: the kernel refuses what lies beyond."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_a_file_system_that_refuses_is_heard(tmp_path, share):
    size = write_tensors(tmp_path / "whole", TENSORS).record.size
    with largest_file(int(share * size)), pytest.raises(OSError) as refusal:
        write_tensors(tmp_path / "cut", TENSORS)
    assert refusal.value.errno == errno.EFBIG
    with largest_file(int(share * size)):
        writer = WriterProcess(tmp_path / "cut by another", TENSORS, FOREVER)
        with pytest.raises(StorageError, match="File too large"):
            writer.wait()


def test_a_process_writes_what_the_tensors_were(tmp_path):
    tensors = [tensor.clone() for tensor in TENSORS]
    writer = WriterProcess(tmp_path / "file", tensors, FOREVER)
    pid = writer.pid
    for tensor in tensors:
        tensor.zero_()
    check(tmp_path / "file", writer.wait())
    assert not psutil.pid_exists(pid)
    writer.close()


def test_many_tensors_fill_no_pipe(tmp_path):
    tensors = [torch.tensor(i) for i in range(6000)]
    written = WriterProcess(tmp_path / "file", tensors, FOREVER).wait()
    assert len(written.spans) == len(tensors)


@pytest.fixture
def standing_writer(tmp_path):
    """A writer that stands still."""
    big = [torch.zeros(20_000_000)]
    writer = WriterProcess(tmp_path / "file", big, FOREVER)
    os.kill(writer.pid, signal.SIGSTOP)
    assert writer.poll() is None
    yield writer
    writer.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGALRM])
def test_a_killed_writer_is_noticed_at_once(standing_writer, number):
    pid, start = standing_writer.pid, time.monotonic()
    os.kill(pid, number)
    os.kill(pid, signal.SIGCONT)
    with pytest.raises(StorageError, match=rf"its writer \(pid {pid}\) was killed by signal {number:d}"):
        standing_writer.wait()
    assert time.monotonic() - start < 10
    assert not psutil.pid_exists(pid)


def test_polling_finds_a_dead_writer_too(standing_writer):
    os.kill(standing_writer.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    with pytest.raises(StorageError, match="is the host out of memory"):
        while standing_writer.poll() is None:
            assert time.monotonic() < deadline
    standing_writer.close()


def test_signals_for_the_job_do_not_end_a_writer(tmp_path):
    writer = WriterProcess(tmp_path / "file", [torch.zeros(2_000_000), *TENSORS], FOREVER)
    time.sleep(0.05)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if writer.pid and psutil.Process(writer.pid).status() != psutil.STATUS_ZOMBIE:
            os.kill(writer.pid, number)
    try:
        writer.wait()
    except StorageError as error:  # it had not come so far as to ignore them
        assert "was killed by signal" in str(error)


def test_a_writer_that_hangs_is_ended_within_its_time(tmp_path):
    writer = WriterProcess(tmp_path / "file", [torch.zeros(20_000_000)], timeout=0.5)
    pid = writer.pid
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(StorageError, match=rf"\(pid {pid}\) has not finished within --async-save-timeout 0.5 seconds"):
        writer.wait()
    assert not psutil.pid_exists(pid)


def test_a_writer_holds_no_descriptor_of_its_parent(tmp_path):
    secret = os.open(tmp_path, os.O_RDONLY)
    writer = WriterProcess(tmp_path / "file", [torch.zeros(1_000_000)] * 200, FOREVER)
    deadline = time.monotonic() + 10
    while str(tmp_path) in _open_paths(writer.pid):
        assert time.monotonic() < deadline
    assert psutil.Process(writer.pid).children() == []
    writer.close()
    os.close(secret)


def _open_paths(pid):
    found = set()
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    return found


def test_a_writer_ends_with_its_parent(tmp_path):
    heard, told = os.pipe()
    if (parent := os.fork()) == 0:
        writer = WriterProcess(tmp_path / "file", [torch.zeros(1_000_000)] * 2000, FOREVER)
        os.write(told, str(writer.pid).encode())
        signal.pause()
    pid = int(os.read(heard, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.close(heard)
    os.close(told)
