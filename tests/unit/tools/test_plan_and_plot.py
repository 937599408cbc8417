"""The entry points that need neither processes nor a model, run as a user runs them."""

import json
import os
import subprocess
import sys

from tests.helpers.repository import ROOT


def _run(tool, *arguments):
    return subprocess.run(
        [sys.executable, f"tools/{tool}.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_layout_table():
    plan = (
        "--layout-table",
        "--preset",
        "metro-large++",
        "--micro-batch-size",
        32,
        "--pipeline-model-parallel-size",
        4,
    )
    result = _run("plan", *plan, "--num-virtual-stages-per-pipeline-rank", 2, "--world-size", 32)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n| ") == 8
    assert "parameters of the model: 852,455,425" in result.stdout
    assert "largest/mean piece: 1.0368" in result.stdout
    assert "theoretical bubble at 8 microbatches: 15.79 %" in result.stdout


def test_a_bad_layout_is_one_line_with_the_nearest_legal_one():
    bad = ("--pipeline-model-parallel-size", 2, "--pipeline-model-parallel-layout", "g*4e*12d*11|d*2")
    result = _run("plan", "--layout-table", "--preset", "metro-base", *bad)
    assert (result.returncode, result.stdout) == (64, "")
    assert result.stderr.count("\n") == 1
    assert (
        '"d" (decoder_layer) is written 13 times and the model has 12; the nearest legal layout is "' in result.stderr
    )


def test_steps_of_a_budget():
    metro = ("--preset", "metro-base", "--global-batch-size", 2048)
    steps = [int(_run("plan", "--flops", flops, *metro).stdout) for flops in ("1e19", "2e19")]
    assert steps[0] > 1 and steps[1] in (2 * steps[0], 2 * steps[0] + 1)
    neither = _run("plan", *metro)
    assert neither.returncode == 64 and "give it, or --flops" in neither.stderr


def test_plot_run(tmp_path):
    lines = [json.dumps({"iteration": i, "split": "train", "lm_loss": 1 / i}) for i in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    result = _run("plot_run", tmp_path, "--output", tmp_path / "curves.png")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "curves.png").stat().st_size > 1000
    missing = _run("plot_run", tmp_path / "none", "--output", tmp_path / "none.png")
    assert missing.returncode == 65 and missing.stderr.count("\n") == 1
    assert not (tmp_path / "none.png").exists()


def test_plot_run_of_seeds(tmp_path):
    for seed, loss in ((1, 2.0), (2, 4.0)):
        (tmp_path / "metro" / f"seed{seed}").mkdir(parents=True)
        line = json.dumps({"iteration": 1, "split": "validation", "lm_loss": loss})
        (tmp_path / "metro" / f"seed{seed}" / "metrics.jsonl").write_text(line + "\n")
    result = _run("plot_run", tmp_path / "metro", "--table", "--output", tmp_path / "curves.png")
    assert result.returncode == 0, result.stderr
    assert "/metro | 2 | 3.000 ± 1.414 |" in result.stdout
