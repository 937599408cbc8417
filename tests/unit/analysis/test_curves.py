"""Reading metrics, averaging groups of runs and drawing them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_metro.analysis.cost import step_flops
from megatron_metro.analysis.curves import (
    Curve,
    choose_names,
    combine,
    format_table,
    name_groups,
    plot_runs,
    read_curves,
    read_group,
    smooth,
)
from megatron_metro.config.cli import save_config
from megatron_metro.config.errors import ConfigError, DataError
from megatron_metro.config.presets import metro_tiny


def _line(iteration, split="train", **numbers):
    return json.dumps({"iteration": iteration, "split": split, **numbers}) + "\n"


def test_a_resumed_run_overwrites_its_repeated_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        _line(1, lm_loss=5.0)
        + _line(2, lm_loss=4.0)
        + _line(2, "validation", lm_loss=4.5)
        + _line(2, lm_loss=3.0, mlm_loss=None)
        + '{"iteration": 3, "lm_l'
    )
    for source in (path, tmp_path):
        curves = read_curves(source)
        assert {split: set(named) for split, named in curves.items()} == {
            "train": {"lm_loss"},
            "validation": {"lm_loss"},
        }
        assert (curves["train"]["lm_loss"].steps, curves["train"]["lm_loss"].values) == ((1, 2), (5.0, 3.0))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (_line(1, lm_loss=1.0) + "nonsense\n" + _line(2, lm_loss=1.0), "line 2"),
        ('{"lm_loss": 1.0}\n' + _line(2, lm_loss=1.0), "line 1"),
        ("[]\n" + _line(2, lm_loss=1.0), "line 1"),
        ("", "no logged step"),
    ],
)
def test_broken_metrics_name_file_and_line(tmp_path, text, match):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=match) as error:
        read_curves(path)
    assert str(path) in str(error.value)


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none.*cannot be read"):
        read_curves(tmp_path / "none")


def test_names(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(_line(1, lr=0.1, mlm_loss=2.0) + _line(1, "validation", lm_loss=3.0))
    run = read_curves(path)
    assert choose_names([run]) == ["mlm_loss", "lm_loss"]
    assert choose_names([run], ["lr"]) == ["lr"]
    with pytest.raises(DataError, match="no run logs oops; choose among lr, mlm_loss, lm_loss"):
        choose_names([run], ["oops"])


def test_smooth_is_the_mean_of_the_last_values():
    assert smooth([1.0, 2.0, 6.0, 7.0], 2) == [1.0, 1.5, 4.0, 6.5]
    assert smooth([1.0, 2.0], 1) == [1.0, 2.0]


def test_a_band_is_where_all_runs_are():
    curves = [Curve(steps=(1, 2, 3), values=(1.0, 2.0, 6.0)), Curve(steps=(3, 2), values=(2.0, 6.0))]
    band = combine([*curves, Curve(steps=(2, 3, 4), values=(1.0, 4.0, 9.0))])
    assert (band.steps, band.lowest, band.mean, band.highest) == ((2, 3), (1.0, 2.0), (3.0, 4.0), (6.0, 6.0))
    assert combine([curves[0], Curve(steps=(), values=())]).steps == ()  # what one run lacks is not averaged


def write_run(folder: Path, *lines: str) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_a_folder_of_runs_is_a_group(tmp_path):
    for seed in (2, 1):
        write_run(tmp_path / "metro" / f"seed{seed}", _line(1, lm_loss=float(seed)))
    (tmp_path / "metro" / "notes").mkdir()
    group = read_group(tmp_path / "metro")
    assert [run["train"]["lm_loss"].values for run in group] == [(1.0,), (2.0,)]
    for alone in (tmp_path / "metro" / "seed2", tmp_path / "metro" / "seed2" / "metrics.jsonl"):
        assert read_group(alone) == group[1:]
    with pytest.raises(DataError, match=r"notes.*cannot be read"):
        read_group(tmp_path / "metro" / "notes")


def test_steps_become_the_flops_of_the_run(tmp_path):
    run = metro_tiny()
    run = replace(run, model=replace(run.model, vocab_size=640))
    write_run(tmp_path / "one", _line(1, lm_loss=1.0), _line(3, lm_loss=2.0))
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        read_group(tmp_path / "one", "FLOPs")
    save_config(run, tmp_path / "one" / "config.yaml")
    [curves] = read_group(tmp_path, "FLOPs")
    assert curves["train"]["lm_loss"].steps == pytest.approx((step_flops(run, 16), 3 * step_flops(run, 16)))


def test_groups_are_told_apart_by_the_end_of_their_path():
    assert name_groups([Path("runs/x/metro"), Path("runs/x/t5")]) == ["metro", "t5"]
    assert name_groups([Path("a/metro"), Path("/b/t5")]) == [str(Path("a/metro").absolute())[1:], "b/t5"]
    assert name_groups([Path("runs/x/metro")]) == ["runs/x/metro"]


def test_the_table_is_of_the_last_held_out_values_of_all_runs():
    def run(loss, **others):
        values = {"lm_loss": loss, **others}
        held_out = {name: Curve(steps=(1, 2), values=(9.0, value)) for name, value in values.items()}
        return {"train": {"grad_norm": Curve(steps=(1,), values=(0.5,))}, "validation": held_out}

    unfinished = {"validation": {"lm_loss": Curve(steps=(1,), values=(7.0,))}}
    groups = {"metro": [run(1.0, rtd_loss=0.1), run(2.0, rtd_loss=0.1), run(6.0)], "t5": [run(4.25)]}
    groups |= {"begun": [run(4.0), unfinished]}
    assert format_table(groups, ["lm_loss", "grad_norm", "rtd_loss"]).splitlines() == [
        "| run | seeds | lm loss | rtd loss |",
        "| :--- | ---: | ---: | ---: |",
        "| metro | 3 | 3.000 ± 2.646 | - |",  # squares of 2, 1 and 3 over 2
        "| t5 | 1 | 4.250 | - |",
        "| begun | 2 | 8.000 ± 1.414 | - |",
    ]


def test_plot_writes_a_png(tmp_path):
    runs = {}
    for name in ("one", "two"):
        steps = [_line(i, lm_loss=5 / i, mlm_loss=4 / i) + _line(i, "validation", lm_loss=6 / i) for i in range(1, 9)]
        (tmp_path / name).write_text("".join(steps))
        runs[name] = read_curves(tmp_path / name)
    output = tmp_path / "new" / "curves.png"
    groups = {"both": list(runs.values()), "one": [runs["one"]]}
    plot_runs(groups, choose_names(list(runs.values())), output, window=3, x_axis="FLOPs")
    assert output.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in output.parent.iterdir()] == ["curves.png"]
