"""How a user goes on: what is refused before any process group, what passes with which flag, and where a run starts."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import load_plain_tensors

from megatron_metro.checkpoint.folder import read_document, step_folder
from megatron_metro.data.preprocess import PreprocessOptions, preprocess
from megatron_metro.parallel.groups import ParallelGroups
from tests.distributed.test_bad_input import SMALL, assert_refused, inputs
from tests.helpers.corpus import Corpus, build_corpus, ignore_progress
from tests.helpers.exact import read_metrics
from tests.helpers.tool_server import ToolRun, ToolServer

RUN = (*SMALL, "--global-batch-size", "none", "--train-iters", 6, "--save-interval", 2, "--log-interval", 1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """And `other`, the same lines without the first."""
    built = build_corpus(tmp_path_factory.mktemp("corpus"))
    rest = built.folder / "rest.jsonl"
    rest.write_text("".join(built.jsonl.read_text().splitlines(keepends=True)[1:]))
    options = PreprocessOptions(inputs=(str(rest),), output_prefix=str(built.folder / "other"))
    preprocess(options, built.tokenizer, ignore_progress)
    return built


@pytest.fixture(scope="module")
def saved(server: ToolServer, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of six steps."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    result = server.run("pretrain", *RUN, *inputs(corpus), "--save", folder)
    assert (result.code, result.err) == (0, "")
    return folder


def read_state(folder: Path, step: int) -> dict:
    return read_document(step_folder(folder, step))


def assert_equal_steps(found: Path, expected: Path, step: int) -> None:
    mine, other = (load_plain_tensors(str(folder / f"iter_{step:07d}")) for folder in (found, expected))
    assert mine.keys() == other.keys() and any(name.startswith("random.") for name in mine)
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []
    for part in ("train", "optimizer", "identity"):
        assert read_state(found, step)[part] == read_state(expected, step)[part]


def test_a_step_says_what_the_run_is(saved: Path, corpus: Corpus) -> None:
    state = read_state(saved, 4)
    counters = {"iteration": 4, "skipped_iterations": 0, "consumed_samples": 16, "consumed_tokens": 16 * 32}
    assert state["train"] | counters == state["train"]
    assert state["identity"]["tokenizer_sha256"] == corpus.tokenizer.sha256
    [text] = state["identity"]["text"]
    assert (text["prefix"], text["share"], text["documents"][0]) == (corpus.prefix, 1.0, 0)
    assert state["config"]["training"]["seed"] == 1234
    assert state["config"]["model"]["vocab_size"] == corpus.tokenizer.vocab_size


# Flags after those of the run, and what the line must name.
REFUSED = {
    "rate": ("--lr 0.5", ["--lr 0.001, this run has 0.5", "--override-opt-param-scheduler"]),
    "length of a decaying run": ("--train-iters 9", ["--lr-decay-iters 6, this run has 9"]),
    "seed": ("--seed 7", ["--seed 1234, this run has 7", "--override-data"]),
    "text": ("--data-path {other}", ["--data-path {prefix} with sha256", "--override-data"]),
    "share of the text": ("--split 50,50,0", ["--split {prefix} with documents 0 to", "--override-data"]),
    "batch": ("--global-batch-size 16", ["--global-batch-size 4, this run has 16", "--override-batch-size"]),
    "objective": (
        "--objective t5-span",
        ["--objective metro, this run has t5-span", "--override-objective"],
    ),
    "masking rate": ("--mask-prob 0.3", ["--mask-prob 0.15, this run has 0.3", "--override-objective"]),
    "dropout": ("--hidden-dropout 0.5", ["--hidden-dropout 0.1, this run has 0.5", "--override-model"]),
    "precision": ("--bf16", ["--bf16 False, this run has True", "--override-model"]),
    "width": ("--hidden-size 32 --use-checkpoint-args", ["--hidden-size 32", "--use-checkpoint-args", "64"]),
}


def change_flags(flags: tuple[object, ...], changes: list[str]) -> list[object]:
    """The flags without those that `changes` give again."""
    given = {word for word in changes if word.startswith("--")}
    pairs = zip((None, *flags), flags)
    return [*(word for before, word in pairs if word not in given and before not in given), *changes]


@pytest.mark.parametrize("change", REFUSED)
def test_another_run_is_refused_before_any_process_group(
    server: ToolServer, corpus: Corpus, saved: Path, tmp_path: Path, change: str
) -> None:
    text, words = REFUSED[change]
    names = {"other": corpus.folder / "other_text_document", "prefix": corpus.prefix}
    said = (*RUN, *inputs(corpus), "--load", saved, "--ckpt-step", 4, "--save", tmp_path / "run")
    flags = change_flags(said, text.format(**names).split())
    result = server.start("pretrain", *flags, may_start_groups=False).finish()
    code = 64 if change == "width" else 66
    assert_refused(result, code, *[word.format(**names) for word in words])
    assert list(tmp_path.iterdir()) == []


def test_the_batch_of_another_number_of_processes_is_refused(
    server: ToolServer, corpus: Corpus, saved: Path, tmp_path: Path
) -> None:
    """Without --global-batch-size it would follow the number of processes unnoticed."""
    flags = (*RUN, *inputs(corpus), "--load", saved, "--save", tmp_path)
    for result in server.run_ranks("pretrain", *flags, world_size=2, may_start_groups=False):
        assert_refused(result, 66, "--global-batch-size 4, this run has 8")


def test_overrides_let_differences_pass_and_are_logged(
    server: ToolServer, corpus: Corpus, saved: Path, tmp_path: Path
) -> None:
    text = "--lr 0.5 --seed 7 --mask-prob 0.3 --global-batch-size 16 --hidden-dropout 0.0 --train-iters 5"
    overrides = [f"--override-{name}" for name in ("opt-param-scheduler", "data", "objective", "batch-size", "model")]
    flags = change_flags((*RUN, *inputs(corpus), "--load", saved, "--ckpt-step", 4, "--save", tmp_path), text.split())
    result = server.run("pretrain", *flags, *overrides)
    assert result.code == 0, result.err
    lines = result.err.splitlines()
    assert [line for line in lines if line == "--override-data: --seed was 1234, is now 7"]
    assert {line.partition(":")[0] for line in lines} == set(overrides)
    assert read_state(tmp_path, 5)["train"]["consumed_samples"] == 32
    # What was overridden is what the run is now.
    again = server.run("pretrain", *change_flags(tuple(flags), ["--load", str(tmp_path), "--ckpt-step", "5"]))
    assert (again.code, again.err) == (0, "")


def test_a_finished_run_has_nothing_left_and_a_longer_one_goes_on(
    server: ToolServer, corpus: Corpus, saved: Path, tmp_path: Path
) -> None:
    flags = (*RUN, *inputs(corpus), "--load", saved, "--save", tmp_path)
    finished = server.run("pretrain", *flags)
    assert finished.code == 0 and "at iteration 6: 0 iterations are left" in finished.out
    assert not list(tmp_path.glob("iter_*"))
    longer = change_flags(flags, ["--train-iters", "8", "--lr-decay-iters", "6"])
    assert server.run("pretrain", *longer).code == 0
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [7, 8]
    assert read_state(tmp_path, 8)["train"]["consumed_samples"] == 32


def test_architecture_and_schedule_from_the_checkpoint(
    server: ToolServer, corpus: Corpus, saved: Path, tmp_path: Path, groups: ParallelGroups
) -> None:
    """Six steps, the last two from flags that say nothing of the model and wrong things of the schedule."""
    said = ("--preset", "metro-tiny", "--data-path", corpus.prefix, "--eval-iters", 0, "--global-batch-size", "none")
    flags = (*said, "--train-iters", 6, "--log-interval", 1, "--lr", 0.5, "--load", saved, "--ckpt-step", 4)
    taken = ("--use-checkpoint-args", "--use-checkpoint-opt-param-scheduler")
    result = server.run("pretrain", *flags, *taken, "--save", tmp_path)
    assert result.code == 0, result.err
    assert_equal_steps(tmp_path, saved, 6)
    assert read_metrics(tmp_path) == read_metrics(saved)[4:]


def test_a_pretrained_checkpoint_starts_a_run_once(
    server: ToolServer, corpus: Corpus, saved: Path, tmp_path: Path, groups: ParallelGroups
) -> None:
    """The same command, first and again."""
    flags = (*RUN, *inputs(corpus), "--lr", 0.25, "--pretrained-checkpoint", saved, "--load", tmp_path)
    command = (*change_flags(flags, ["--train-iters", "4"]), "--save", tmp_path, "--exit-on-missing-checkpoint")
    first = server.run("pretrain", *command, "--exit-interval", 2)
    assert first.code == 0, first.err
    assert "from" in first.out and "at iteration 0: 4 iterations are left" in first.out
    second = server.run("pretrain", *command)
    assert second.code == 0 and f"from {tmp_path} at iteration 2: 2 iterations are left" in second.out
    tuned = server.run(
        "pretrain", *change_flags((*RUN, *inputs(corpus)), ["--train-iters", "4"]), "--lr", 0.25,
        "--load", saved, "--finetune", "--save", tmp_path / "tuned",
    )  # fmt: skip
    assert tuned.code == 0, tuned.err
    assert_equal_steps(tmp_path, tmp_path / "tuned", 4)


def test_random_states_are_left_on_demand(
    server: ToolServer, corpus: Corpus, saved: Path, tmp_path: Path, groups: ParallelGroups
) -> None:
    flags = (*RUN, *inputs(corpus), "--load", saved, "--ckpt-step", 4)
    for name, more in (("with", ()), ("without", ("--no-load-rng",))):
        assert server.run("pretrain", *flags, *more, "--save", tmp_path / name).code == 0
    assert_equal_steps(tmp_path / "with", saved, 6)
    counts = [read_state(folder, 6)["train"]["consumed_samples"] for folder in (tmp_path / "without", saved)]
    assert counts[0] == counts[1]
    losses = [[line["lm_loss"] for line in read_metrics(tmp_path / name)] for name in ("with", "without")]
    assert losses[0] != losses[1]  # other dropout


def wait_for_step(folder: Path, step: int) -> None:
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 60.0
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        assert time.monotonic() < deadline, "the run did not get as far"
        time.sleep(0.002)


def test_a_killed_run_ends_as_if_it_had_not_been(
    server: ToolServer, corpus: Corpus, saved: Path, tmp_path: Path, groups: ParallelGroups
) -> None:
    flags = (*RUN, *inputs(corpus), "--load", tmp_path, "--save", tmp_path)
    running = server.start("pretrain", *flags)
    wait_for_step(tmp_path, 3)
    os.kill(running.pid, signal.SIGKILL)
    running.finish()
    again: ToolRun = server.run("pretrain", *flags)
    assert again.code == 0, again.err
    assert_equal_steps(tmp_path, saved, 6)
    assert read_metrics(tmp_path) == read_metrics(saved)
