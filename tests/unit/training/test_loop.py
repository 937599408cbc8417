"""What the loop says of several steps, and what it fills into a configuration."""

import shutil
from dataclasses import replace
from math import inf, nan

import pytest

from megatron_metro.config.errors import ConfigError
from megatron_metro.config.schema import DataConfig, OptimizerConfig, RunConfig
from megatron_metro.data.loader import build_loaders
from megatron_metro.parallel.groups import find_place
from megatron_metro.tokenizer import NullTokenizer
from megatron_metro.training.engine import StepResult
from megatron_metro.training.loop import Window, fit_to_machine, list_agreed
from megatron_metro.training.optimizer import StepOutcome
from tests.helpers.corpus import build_corpus, make_config


def make_result(grad_norm: float, **metrics: float) -> StepResult:
    outcome = StepOutcome(updated=grad_norm < inf, grad_norm=grad_norm, loss_scale=1.0)
    return StepResult({name.replace("_", " "): value for name, value in metrics.items()}, outcome)


def test_a_window_counts_and_averages():
    window = Window(
        [make_result(1.0, lm_loss=4.0, mlm_loss=3.0), make_result(nan, lm_loss=2.0), make_result(inf, lm_loss=0.0)]
    )
    assert (window.num_skipped, window.num_nan) == (2, 2)
    assert window.mean_metrics() == {"lm loss": 2.0, "mlm loss": 3.0}


def test_workers_follow_the_device_unless_given(device):
    tokenizer = NullTokenizer(100, 10)
    run = fit_to_machine(RunConfig(), tokenizer, device)
    assert (run.data.num_workers, run.model.vocab_size) == (0, 110)
    assert fit_to_machine(RunConfig(data=DataConfig(num_workers=3)), tokenizer, device).data.num_workers == 3


def test_ranks_must_agree_about_flags_and_text(tmp_path):
    corpus = build_corpus(tmp_path)
    run = make_config(f"{tmp_path}/copy")

    def copy_and_list(prefix, run):
        for suffix in ("bin", "idx", "json"):
            shutil.copy(f"{prefix}.{suffix}", tmp_path / f"copy.{suffix}")
        return list_agreed(run, corpus.tokenizer, *build_loaders(run, corpus.tokenizer, dp_rank=0, dp_size=1))

    lines = copy_and_list(corpus.prefix, run)
    assert copy_and_list(corpus.prefix, run) == lines
    changed = copy_and_list(corpus.prefix, replace(run, optimizer=OptimizerConfig(lr=0.25)))
    assert [line for line in changed if line not in lines] == ["--lr 0.25"]
    # The same path with other text behind it, as on another machine: every rank builds its batches from its own copy.
    other = copy_and_list(corpus.lines_prefix, run)
    assert {line.rpartition(" ")[0] for line in set(other) - set(lines)} == {f"{tmp_path}/copy with checksum"}


def test_half_a_job_in_the_environment_is_refused(monkeypatch):
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert find_place() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 without RANK and MASTER_ADDR"):
        find_place()
    for name, value in zip(names, ("1", "2", "127.0.0.1", "1234")):
        monkeypatch.setenv(name, value)
    assert find_place() == (1, 2)
    for rank in ("2", "x", "-1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ConfigError, match="is no place"):
            find_place()
