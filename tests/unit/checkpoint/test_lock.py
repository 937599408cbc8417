"""One job per folder of checkpoints."""

import os
import signal
import socket

import pytest

from megatron_metro.checkpoint.lock import LOCK, SaveLock
from megatron_metro.config.errors import CheckpointError, StorageError


def test_a_second_holder_is_refused_by_name_until_the_first_lets_go(tmp_path):
    folder = tmp_path / "new" / "run"
    first, second = SaveLock(folder), SaveLock(folder)
    first.acquire()
    name = rf"in use by process {os.getpid()} on host '{socket.gethostname()}' since '20"
    for _ in range(2):
        with pytest.raises(CheckpointError, match=name) as refusal:
            second.acquire()
    assert "\n" not in str(refusal.value)
    first.close()
    first.close()
    second.acquire()
    second.close()


def test_a_lock_dies_with_its_process(tmp_path):
    ready, tell = os.pipe()
    if (child := os.fork()) == 0:
        SaveLock(tmp_path).acquire()
        os.write(tell, b"x")
        signal.pause()
    os.read(ready, 1)
    with pytest.raises(CheckpointError, match=f"in use by process {child} on host"):
        SaveLock(tmp_path).acquire()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock = SaveLock(tmp_path)
    lock.acquire()
    lock.close()
    os.close(ready)
    os.close(tell)


def test_a_holder_that_says_nothing_of_itself(tmp_path):
    lock = SaveLock(tmp_path)
    lock.acquire()
    (tmp_path / LOCK).write_bytes(b"\xff{")
    with pytest.raises(CheckpointError, match="in use by another process"):
        SaveLock(tmp_path).acquire()
    lock.close()


def test_where_there_can_be_no_lock(tmp_path):
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="cannot be locked"):
        SaveLock(tmp_path).acquire()
    assert not (tmp_path / "elsewhere").exists()
