"""Saves of a run: in the background as at once, which steps stay, and whole runs with all of it."""

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from megatron_metro.checkpoint.folder import TRACKER, list_iterations, step_folder
from megatron_metro.checkpoint.lock import LOCK
from megatron_metro.checkpoint.manifest import verify_step
from megatron_metro.config.errors import CheckpointError, StorageError
from megatron_metro.config.schema import CheckpointConfig, ParallelConfig
from megatron_metro.training.saving import Saver
from tests.distributed.test_checkpoint import BF16, DP2_DISTRIBUTED, FP32, PP2, TP2, Run
from tests.helpers.corpus import build_corpus


class SavedRun(Run):
    """A run with its saver."""

    def __init__(self, parallel, optimizer, checkpoint: CheckpointConfig) -> None:
        super().__init__(parallel, optimizer, checkpoint)
        self.announced: list[int] = []
        self.saver = Saver(self.config, self.groups, {}, self.announced.append)

    def save(self) -> None:
        self.saver.save(self.state, self.chunks, self.optimizer)


def save_in_background(parallel, optimizer, folder: str) -> None:
    run = SavedRun(parallel, optimizer, CheckpointConfig(save=folder, async_save=True))
    run.advance(2)
    run.save()
    saved = run.tensors()
    assert run.announced == []
    run.advance(3)
    run.save()
    assert run.announced == [2], "two saves at once"
    run.advance(4)
    run.saver.wait()
    assert run.announced == [2, 3]
    run.saver.poll()
    with pytest.raises(CheckpointError, match="exists already"):
        run.state = type(run.state)(iteration=3)
        run.save()
    resumed = Run(parallel, optimizer, CheckpointConfig(load=folder, ckpt_step=2))
    resumed.load()
    for name, tensor in resumed.tensors().items():
        assert torch.equal(tensor, saved[name]), name


@pytest.mark.parametrize(("parallel", "optimizer"), [(TP2, FP32), (DP2_DISTRIBUTED, BF16), (PP2, BF16)])
def test_training_goes_on_while_a_step_is_written(pool, tmp_path, parallel, optimizer):
    pool(2).run(save_in_background, parallel, optimizer, str(tmp_path))
    assert list_iterations(tmp_path) == [2, 3]
    for iteration in (2, 3):
        verify_step(step_folder(tmp_path, iteration))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000002", "iter_0000003", TRACKER]


def test_polling_publishes(groups, tmp_path):
    run = SavedRun(ParallelConfig(), FP32, CheckpointConfig(save=str(tmp_path), async_save=True))
    run.advance(2)
    run.save()
    deadline = time.monotonic() + 60
    while not run.announced:
        run.saver.poll()
        assert time.monotonic() < deadline
    assert (tmp_path / TRACKER).read_text() == "2"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_writer_loses_its_step_alone(groups, tmp_path, number):
    options = {"save": str(tmp_path), "async_save": True}
    run = SavedRun(ParallelConfig(), FP32, CheckpointConfig(**options))
    run.advance(2)
    run.save()
    run.saver.wait()
    run = SavedRun(ParallelConfig(), FP32, CheckpointConfig(**options, load=str(tmp_path), async_save_timeout=2.0))
    run.load()
    run.advance(3)
    others = set(psutil.Process().children())
    run.save()
    [child] = set(psutil.Process().children()) - others
    child.send_signal(number)
    start = time.monotonic()
    words = "was killed by signal 9" if number == signal.SIGKILL else "has not finished within --async-save-timeout 2"
    try:
        run.saver.wait()
    except StorageError as error:
        assert words in str(error) and "earlier steps are intact" in str(error)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000002", TRACKER]
    else:  # it had been faster than the signal
        assert run.announced == [3]
    assert time.monotonic() - start < 30
    assert not psutil.pid_exists(child.pid)
    run.saver.wait()


def save_and_let_go(folder: str) -> None:
    run = SavedRun(DP2_DISTRIBUTED, FP32, CheckpointConfig(save=folder, keep_last=2, save_retain_interval=3))
    for step in range(1, 7):
        run.advance(step)
        run.save()
    assert run.announced == [1, 2, 3, 4, 5, 6]


def test_only_what_is_to_be_retained_stays(pool, tmp_path):
    pool(2).run(save_and_let_go, str(tmp_path))
    assert list_iterations(tmp_path) == [3, 5, 6]


def test_nothing_is_let_go_before_the_newest_step_is_verified(groups, tmp_path, monkeypatch):
    run = SavedRun(ParallelConfig(), FP32, CheckpointConfig(save=str(tmp_path), keep_last=1))
    run.advance(1)
    run.save()
    run.advance(2)

    def damage(temporary, final, *arguments):
        really_publish(temporary, final, *arguments)
        shard = final / "__0_0.distcp"
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")

    from megatron_metro.training import saving

    really_publish = saving.publish
    monkeypatch.setattr(saving, "publish", damage)
    with pytest.raises(CheckpointError, match="is damaged, its SHA-256"):
        run.save()
    assert run.announced == [1]
    assert list_iterations(tmp_path) == [1, 2]


SMALL = (
    "--preset", "metro-tiny", "--vocab-extra-ids", 64, "--encoder-seq-length", 32, "--lr-warmup-iters", 0,
    "--lr-decay-iters", 10**6, "--eval-iters", 0, "--log-interval", 1,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    corpus = build_corpus(tmp_path_factory.mktemp("corpus"))
    return ["--tokenizer-model", corpus.model, "--data-path", corpus.prefix]


def test_a_run_saves_in_the_background_and_goes_on(server, data, tmp_path):
    flags = (*SMALL, *data, "--async-save", "--save-interval", 2, "--keep-last", 2, "--save", tmp_path)
    ranks = server.run_ranks("pretrain", *flags, "--train-iters", 5, world_size=2)
    assert [(rank.code, rank.err) for rank in ranks] == [(0, ""), (0, "")]
    events = re.findall(r"(saving|saved) checkpoint (?:at|from) iteration +(\d+)", ranks[1].out)
    said = [(word, int(n)) for word, n in events]
    assert sorted(said) == [(word, n) for word in ("saved", "saving") for n in (2, 4, 5)]
    assert all(said.index(("saving", n)) < said.index(("saved", n)) for n in (2, 4, 5))
    assert list_iterations(tmp_path) == [4, 5]
    ranks = server.run_ranks("pretrain", *flags, "--load", tmp_path, "--train-iters", 6, world_size=2)
    assert [(rank.code, rank.err) for rank in ranks] == [(0, ""), (0, "")]
    assert "at iteration 5" in ranks[1].out and list_iterations(tmp_path) == [5, 6]


def test_a_second_job_is_refused_while_the_first_runs_and_readers_are_not(server, data, tmp_path):
    flags = (*SMALL, *data, "--save", tmp_path, "--save-interval", 5)
    running = server.start("pretrain", *flags, "--train-iters", 10**6)
    deadline = time.monotonic() + 60
    while not (tmp_path / TRACKER).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # With --load it would go on from the first job's step.
    for result in server.run_ranks("pretrain", *flags, "--load", tmp_path, "--train-iters", 10**6, world_size=2):
        assert result.code == 66
        assert f"--save {tmp_path}: in use by process {running.pid} on host" in result.error
    step = step_folder(tmp_path, list_iterations(tmp_path)[-1])
    verify_step(step)
    reader = server.run("pretrain", *SMALL, *data, "--load", tmp_path, "--ckpt-step", 5, "--train-iters", 6)
    assert (reader.code, reader.err) == (0, "")
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == running.pid
    os.kill(running.pid, signal.SIGKILL)
    assert running.finish().code == -signal.SIGKILL
    newest = list_iterations(tmp_path)[-1]
    more = ("--load", tmp_path, "--train-iters", newest + 1)
    again = server.run("pretrain", *flags, *more)
    assert (again.code, again.err) == (0, "")


def test_a_damaged_newest_step_stops_the_run_unless_told_otherwise(server, data, tmp_path):
    flags = (*SMALL, *data, "--save", tmp_path, "--load", tmp_path)
    for train_iters in (2, 4):
        result = server.run("pretrain", *flags, "--train-iters", train_iters)
        assert result.code == 0, result.err
    shard = tmp_path / "iter_0000004" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    result = server.run("pretrain", *flags, "--train-iters", 5)
    assert result.code == 66
    assert f"{shard}: is damaged" in result.error
    result = server.run("pretrain", *flags, "--train-iters", 5, "--skip-damaged-checkpoints")
    assert result.code == 0
    assert f"{shard}: is damaged" in result.err and "now called iter_0000004." in result.err
    assert "at iteration 2" in result.out
    assert list_iterations(tmp_path) == [2, 5]
    assert Path(tmp_path / TRACKER).read_text() == "5"
