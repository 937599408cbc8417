"""Log lines that Megatron's parsers read, metrics in full precision, files that survive a resume."""

import io
import json
import math
import sys
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace

import pytest

from megatron_metro.config.errors import ConfigError
from megatron_metro.config.schema import CheckpointConfig, LoggingConfig, RunConfig
from megatron_metro.training.reporting import (
    METRICS_FILE,
    Reporter,
    StepReport,
    check_tensorboard,
    format_step,
    format_validation,
)

METRICS = {"lm loss": 2.345678901234, "mlm loss": 1.5, "rtd loss": 0.0, "generator accuracy": 0.25}
REPORT = StepReport(
    iteration=20,
    consumed_samples=5120,
    learning_rate=4e-8,
    global_batch_size=256,
    metrics=METRICS,
    loss_scale=1.0,
    grad_norm=1.23456789,
    seconds_per_iteration=0.5,
)
GROUPS = SimpleNamespace(rank=0, world_size=1, tp_rank=0, tp_size=1, pp_rank=0, pp_size=1)
NOW = datetime(2026, 1, 2, 3, 4, 5)


def reporter(config=None, groups=GROUPS, start=0, **options):
    stream = io.StringIO()
    return Reporter(
        config or RunConfig(), groups, train_iters=100, start_iteration=start, stream=stream, **options
    ), stream


def metrics_lines(folder):
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_the_log_line_is_megatrons():
    assert format_step(REPORT, 100, NOW) == (
        " [2026-01-02 03:04:05] iteration       20/     100 | consumed samples:         5120 | "
        "elapsed time per iteration (ms): 500.0 | learning rate: 4.000000E-08 | global batch size:   256 | "
        "lm loss: 2.345679E+00 | mlm loss: 1.500000E+00 | rtd loss: 0.000000E+00 | generator accuracy: 2.500000E-01 | "
        "loss scale: 1.0 | grad norm: 1.235 | number of skipped iterations:   0 | number of nan iterations:   0 |"
    )


def test_speed_and_parameter_norm_are_told_when_known():
    report = replace(REPORT, tflops_per_device=400.0, peak_tflops=800.0, params_norm=12.3456, num_skipped=2)
    line = format_step(report, 100, NOW)
    assert (
        "(ms): 500.0 | throughput per GPU (TFLOP/s/GPU): 400.0 | MFU: 50.0 % | time left: 0:00:40 | learning rate"
    ) in line
    assert "grad norm: 1.235 | params norm: 12.346 | number of skipped iterations:   2" in line
    assert "MFU" not in format_step(replace(report, peak_tflops=None), 100, NOW)
    assert "(TFLOP/s/GPU): 0.012 | " in format_step(replace(report, tflops_per_device=0.01234), 100, NOW)


def test_the_validation_box():
    box = format_validation(20, {"lm loss": 1.0, "generator accuracy": 0.5}).splitlines()
    assert box[1] == (
        " validation loss at iteration 20 | lm loss value: 1.000000E+00 | lm loss PPL: 2.718282E+00 | "
        "generator accuracy value: 5.000000E-01 | "
    )
    assert box[0] == box[2] == "-" * (len(box[1]) + 1)


def test_metrics_file_in_full_precision(tmp_path):
    config = RunConfig(checkpoint=CheckpointConfig(save=str(tmp_path / "new")))
    report, stream = reporter(config)
    report.step(replace(REPORT, grad_norm=math.inf))
    report.validation(20, 5120, {"lm loss": 0.1 + 0.2})
    report.close()
    step, validation = metrics_lines(tmp_path / "new")
    assert step["lm_loss"] == METRICS["lm loss"]
    assert step["generator_accuracy"] == 0.25
    assert (step["iteration"], step["consumed_samples"], step["lr"], step["split"]) == (20, 5120, 4e-8, "train")
    assert step["grad_norm"] is None
    assert validation == {"iteration": 20, "split": "validation", "consumed_samples": 5120, "lm_loss": 0.1 + 0.2}
    assert stream.getvalue().count("iteration") > 1


def test_a_resumed_run_repeats_no_step(tmp_path):
    config = RunConfig(checkpoint=CheckpointConfig(save=str(tmp_path)))
    first, _ = reporter(config)
    for iteration in (10, 20, 30):
        first.step(replace(REPORT, iteration=iteration))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"iteration": 10, "lm_')  # the machine went down here
    second, _ = reporter(config, start=20)
    second.step(replace(REPORT, iteration=30))
    assert [line["iteration"] for line in metrics_lines(tmp_path)] == [10, 20, 30]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_only_the_last_rank_speaks(tmp_path):
    config = RunConfig(checkpoint=CheckpointConfig(save=str(tmp_path)))
    report, stream = reporter(config, SimpleNamespace(**{**vars(GROUPS), "world_size": 2}))
    report.step(REPORT)
    report.validation(20, 5120, METRICS)
    report.saving(20, "runs/x")
    report.advance(20)
    report.close()
    assert stream.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_messages_and_phases():
    report, stream = reporter()
    report.saving(20, "runs/x")
    report.saved(20, "runs/x")
    report.phase("before the start of training step")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "saving checkpoint at iteration      20 to runs/x in torch_dist format"
    assert lines[1] == "  successfully saved checkpoint from iteration      20 to runs/x [ t 1/1, p 1/1 ]"
    assert lines[2].startswith("[before the start of training step] datetime: 20")


def test_progress_bar_only_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    report, stream = reporter(start=19)
    report.advance(20)
    report.step(REPORT)
    report.close()
    assert "20/100" in terminal.getvalue()
    assert "iteration       20" in stream.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    report, _ = reporter()
    report.advance(1)
    assert sys.stderr.getvalue() == ""


def test_tensorboard(tmp_path, monkeypatch):
    logging = LoggingConfig(tensorboard_dir=str(tmp_path))
    check_tensorboard(logging)
    report, _ = reporter(RunConfig(logging=logging))
    report.step(REPORT)
    report.validation(20, 5120, METRICS)
    report.close()
    (events,) = tmp_path.iterdir()
    assert b"lm loss validation" in events.read_bytes()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--tensorboard-dir .* not installed; pip install tensorboard"):
        check_tensorboard(logging)
    check_tensorboard(LoggingConfig())
