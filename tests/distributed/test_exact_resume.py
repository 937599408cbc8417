"""A resumed run is the uninterrupted one, to the bit: weights, optimizer state, random states, counters, log lines.

Fifty steps of every kind and layout are in tests/full/test_exact_resume_full.py.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_metro.analysis.curves import read_curves
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.training import loading
from megatron_metro.training.engine import Engine, StepResult
from megatron_metro.training.state import TrainState, restore_state
from tests.helpers.distributed import WorkerPool
from tests.helpers.exact import (
    EVAL_INTERVAL,
    LOG_INTERVAL,
    make_run,
    read_metrics,
    resume_and_compare,
    run_on,
    train_whole,
)
from tests.helpers.markov import write_source

Pool = Callable[[int], WorkerPool]

NUM_STEPS = 12
CASES = [
    ("metro, AdamW", "dp2"),
    ("metro, AdamW, BF16", "pp2"),
    ("spactor, Adafactor", "tp2"),
    ("t5, AdamW, FP16", "one"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Text whose epoch, of some 70 blocks of 32 tokens, ends within the run."""
    return write_source(tmp_path_factory.mktemp("source"), num_documents=20, length=120)


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_a_resumed_run_is_the_uninterrupted_one(
    kind: str, layout: str, source: str, pool: Pool, groups: ParallelGroups, tmp_path: Path
) -> None:
    run = make_run(kind, layout, source, tmp_path / "whole", NUM_STEPS)
    run_on(pool, layout, train_whole, run, NUM_STEPS)
    generator = random.Random(f"{kind} {layout}")
    # In the middle, where SPACTOR switches; the last step but one; and anywhere.
    saved = sorted({NUM_STEPS // 2, NUM_STEPS - 1, generator.randrange(1, NUM_STEPS)})
    for wrong in run_on(pool, layout, resume_and_compare, run, saved, 2, str(tmp_path / "rest")):
        assert wrong == []
    lines = {(line["split"], line["iteration"]): line for line in read_metrics(tmp_path / "whole")}
    for step in saved:
        logged = [
            line
            for line in read_metrics(tmp_path / "rest" / str(step))
            if line["iteration"] % (LOG_INTERVAL if line["split"] == "train" else EVAL_INTERVAL) == 0
        ]
        assert logged == [lines[line["split"], line["iteration"]] for line in logged]


def count_a_skip(numbers: dict[str, Any]) -> TrainState:
    return replace(restore_state(numbers), skipped_iterations=1)


# What is left out when loading, and what then differs.
FORGOTTEN = {
    "random states": ("random_tensors", lambda kind, groups: [], "random "),
    "updates": ("set_num_updates", lambda optimizer, count: None, "updates"),
    "counters": (
        "restore_state",
        lambda numbers: replace(restore_state(numbers), skipped_iterations=1),
        "state skipped",
    ),
}


@pytest.mark.parametrize("what", FORGOTTEN)
def test_what_is_not_loaded_is_found(
    what: str, source: str, groups: ParallelGroups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, replacement, said = FORGOTTEN[what]
    run = make_run("metro, AdamW", "one", source, tmp_path / "whole", 6)
    train_whole(run, 6)
    monkeypatch.setattr(loading, name, replacement)
    wrong = resume_and_compare(run, [4], 2, str(tmp_path / "rest"))
    assert any(f"from step 4: {said}" in text for text in wrong)
    if what == "random states":
        assert any("weight" in text for text in wrong)  # dropout is on


def test_every_step_of_a_small_epoch(source: str, groups: ParallelGroups, tmp_path: Path) -> None:
    """Batches of 16 from some 70 blocks: epochs end within batches, at another place each time."""
    run = make_run("t5, Adafactor", "one", source, tmp_path / "whole", 7, global_batch_size=16)
    train_whole(run, 7)
    assert resume_and_compare(run, range(1, 7), 1, str(tmp_path / "rest")) == []


class Killed(Exception):
    """Stands for the end of a process."""


def die_after(num_steps: int) -> Callable[..., StepResult]:
    """`Engine.train_step` that trains so many steps and no more."""
    train_step, taken = Engine.train_step, []

    def take_step(*arguments: Any) -> StepResult:
        if len(taken) == num_steps:
            raise Killed
        taken.append(num_steps)
        return train_step(*arguments)

    return take_step


def test_a_run_that_died_beyond_its_checkpoint_logs_each_step_once(
    source: str, groups: ParallelGroups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a mean over steps before and after the checkpoint is that of all of them."""
    whole, died = (
        make_run("metro, AdamW", "one", source, tmp_path / name, 12, save_interval=4, log_interval=3)
        for name in ("whole", "died")
    )
    train_whole(whole, 12)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Engine, "train_step", die_after(7))
        train_whole(died, 12)
    assert [line["iteration"] for line in read_metrics(tmp_path / "died")] == [3, 6, 7]
    train_whole(replace(died, checkpoint=replace(died.checkpoint, load=died.checkpoint.save)), 12)
    assert read_metrics(tmp_path / "died") == read_metrics(tmp_path / "whole")
    curve = read_curves(tmp_path / "died")["train"]["lm_loss"]
    assert curve.steps == (3, 6, 9, 12)
