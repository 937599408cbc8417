"""Errors as a user can act on them, and the file that says how a rank ended."""

import json
import os
import subprocess
import time
from contextlib import nullcontext
from dataclasses import replace

import psutil
import pytest
import torch

from megatron_metro.config.errors import DataError, OutOfMemoryError, StorageError
from megatron_metro.config.presets import PRESETS
from megatron_metro.config.schema import CheckpointConfig, RunConfig
from megatron_metro.parallel.side_channel import Process, is_connection_error
from megatron_metro.training.reporting import Reporter
from megatron_metro.training.status import STATUS_FOLDER, Progress, StatusFile
from megatron_metro.training.supervision import is_out_of_memory, stopped_by, supervise, translate


def wait_for(condition):
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# What this machine's allocator says; the test below makes it say so.
HUGE = 2**46


def ask_for_too_much() -> None:
    torch.empty(HUGE, dtype=torch.uint8)


def ask_numpy_for_too_much() -> None:
    import numpy as np

    np.ones(HUGE, dtype=np.uint8)


@pytest.mark.parametrize("ask", [ask_for_too_much, ask_numpy_for_too_much])
def test_no_memory_names_the_flags_to_change(ask):
    run = PRESETS["metro-tiny"]()
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        ask()
    error = translate(caught.value, run, Progress(step=3, phase="step"))
    assert isinstance(error, OutOfMemoryError) and error.exit_code == 71
    for words in ("after iteration 3, phase step", f"--micro-batch-size {run.training.micro_batch_size}", "--bf16"):
        assert words in str(error)
    saving = replace(
        run,
        training=replace(run.training, micro_batch_size=1),
        parallel=replace(run.parallel, recompute_granularity="full", use_distributed_optimizer=True),
    )
    text = str(translate(caught.value, saving, Progress()))
    assert not any(flag in text for flag in ("--micro-batch", "--recompute", "--use-distributed"))


def test_memory_of_a_gpu_is_known_too():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_other_errors_keep_their_kind():
    run, progress = RunConfig(), Progress(step=3, phase="report")
    bug, data = KeyError("x"), DataError("damaged")
    assert translate(bug, run, progress) is bug and translate(data, run, progress) is data
    full = translate(OSError(28, "No space left on device"), run, progress)
    assert isinstance(full, StorageError) and "No space left on device" in str(full)
    # No exit from within a run is a success.
    assert [translate(SystemExit(code), run, progress).code for code in (0, None, 3, "text")] == [70, 70, 3, 70]


def test_what_gloo_says_of_lost_peers_is_known():
    for text in (
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:1",
        "Timed out waiting 10000ms for send operation to complete [gloo]",
        "NCCL communicator was aborted on rank 0.",
    ):
        assert is_connection_error(RuntimeError(text))
    assert is_connection_error(torch.distributed.DistNetworkError("x"))
    assert not is_connection_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_connection_error(ValueError("Connection ")) and not is_connection_error(None)


def test_a_process_is_alive_until_it_has_ended_collected_or_not():
    assert Process.own().is_alive()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        process = Process.own()._replace(pid=child.pid, started=psutil.Process(child.pid).create_time())
        assert process.is_alive()
        child.stdin.close()
        wait_for(lambda: not process.is_alive())  # nobody has collected it yet
    assert not process.is_alive()
    assert not Process.own()._replace(started=1.0).is_alive()  # another process with a used id


def read_status(folder) -> dict:
    return json.loads((folder / STATUS_FOLDER / "rank_00000.json").read_text())


@pytest.mark.parametrize(
    ("error", "cause", "code"),
    [
        (None, "done", 0),
        (DataError("damaged\nfile"), "data", 65),
        (KeyError("x"), "bug", 70),
        (SystemExit(0), "bug", 70),
        (KeyboardInterrupt(), "interrupted", 130),
        (stopped_by("SIGTERM", "folder", 3), "preempted", 75),
        (stopped_by("SIGINT", None, 3), "interrupted", 130),
    ],
)
def test_the_status_says_how_a_rank_ended(groups, tmp_path, error, cause, code):
    run = RunConfig(checkpoint=CheckpointConfig(save=str(tmp_path)))
    ends = nullcontext() if error is None else pytest.raises(type(error))
    with ends, supervise(run, groups) as supervisor:
        assert (read_status(tmp_path)["cause"], read_status(tmp_path)["exit"]) == ("running", None)
        supervisor.progress.enter("step")
        supervisor.step_is_done(3)
        supervisor.progress.last_good = 2
        if error is not None:
            raise error
    status = read_status(tmp_path)
    assert (status["cause"], status["exit"], status["rank"]) == (cause, code, 0)
    assert (status["step"], status["last_good"], status["pid"]) == (3, 2, os.getpid())
    assert "\n" not in status["message"]
    assert [path.name for path in (tmp_path / STATUS_FOLDER).iterdir()] == ["rank_00000.json"]


def test_without_a_folder_nothing_is_written(groups, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    StatusFile(None, 0, Progress()).write("done", 0)
    with supervise(RunConfig(), groups):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "anomalies.jsonl"])
def test_a_full_disk_is_one_line(groups, tmp_path, name):
    run = RunConfig(checkpoint=CheckpointConfig(save=str(tmp_path)))
    reporter = Reporter(run, groups, train_iters=3, start_iteration=0)
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(StorageError, match=f"{name}: No space left on device") as caught:
        if name == "metrics.jsonl":
            reporter.validation(1, 8, {"lm loss": 1.0})
        else:
            reporter.anomaly("text", {"iteration": 1})
    assert caught.value.exit_code == 74
