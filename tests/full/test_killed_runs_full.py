"""Whole jobs under torchrun, killed again and again: every announced step is there, and each start goes on from it."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_metro.checkpoint.folder import list_iterations, step_folder
from megatron_metro.checkpoint.manifest import verify_step
from tests.helpers.corpus import Corpus, build_corpus
from tests.helpers.repository import ROOT

NUM_KILLS = 100
SMALL = (
    "--preset", "metro-tiny", "--vocab-extra-ids", "64", "--encoder-seq-length", "32", "--lr-warmup-iters", "0",
    "--eval-iters", "0", "--log-interval", "1", "--lr-decay-iters", "1000",
)  # fmt: skip


def start(corpus: Corpus, folder: Path, kill: tuple[int, int], *flags: str) -> subprocess.CompletedProcess[str]:
    """Two ranks that save after every second step; rank kill[0] dies before its kill[1]-th change to the folder."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "tests.helpers.killed_pretrain", *map(str, kill), str(folder)),
        *(*SMALL, "--tokenizer-model", str(corpus.model), "--data-path", str(corpus.prefix)),
        *("--save", str(folder), "--load", str(folder), "--save-interval", "2", *flags),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.full
def test_jobs_killed_again_and_again(tmp_path, record_property):
    corpus, folder = build_corpus(tmp_path), tmp_path / "run"
    generator, num_kills, announced, num_starts = random.Random(1), 0, 0, 0
    while num_kills < NUM_KILLS:
        rank = generator.randrange(2)
        kill = rank, generator.randrange(90 if rank == 0 else 12)
        options = ["--async-save"] * (generator.random() < 0.5) + ["--keep-last", "3"] * (generator.random() < 0.5)
        end = ("--exit-interval", str(announced // 2 * 2 + 6))
        ended = start(corpus, folder, kill, "--train-iters", "1000", *end, *options)
        num_starts += 1
        num_kills += ended.returncode != 0
        said = [int(n) for n in re.findall(r"successfully saved checkpoint from iteration +(\d+)", ended.stdout)]
        loaded = re.search(r"successfully loaded checkpoint from \S+ at iteration (\d+)", ended.stdout)
        assert loaded is None or int(loaded[1]) >= announced, "went on from an older step"
        announced = max([announced, *said])
        iterations = list_iterations(folder)
        assert max(iterations, default=0) >= announced, f"iteration {announced} was announced and is lost"
        announced = max([announced, *iterations])
        for iteration in iterations:
            verify_step(step_folder(folder, iteration))
        commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        assert not [command for command in commands if str(folder) in command], "processes outlived their job"
    ended = start(corpus, folder, (0, -1), "--train-iters", str(announced + 2))
    assert ended.returncode == 0, ended.stderr
    assert f"at iteration {announced}:" in ended.stdout
    assert not [path.name for path in folder.iterdir() if path.suffix in (".partial", ".deleted", ".tmp")]
    record_property("jobs killed under torchrun, 0 announced steps lost", num_kills)
    record_property("starts", num_starts)
