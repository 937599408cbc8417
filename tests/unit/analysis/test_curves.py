"""Reading metrics and drawing them."""

import json

import pytest

from megatron_metro.analysis.curves import choose_names, plot_runs, read_curves, smooth
from megatron_metro.config.errors import DataError


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


def test_plot_writes_a_png(tmp_path):
    runs = {}
    for name in ("one", "two"):
        steps = [_line(i, lm_loss=5 / i, mlm_loss=4 / i) + _line(i, "validation", lm_loss=6 / i) for i in range(1, 9)]
        (tmp_path / name).write_text("".join(steps))
        runs[name] = read_curves(tmp_path / name)
    output = tmp_path / "new" / "curves.png"
    plot_runs(runs, choose_names(list(runs.values())), output, window=3)
    assert output.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in output.parent.iterdir()] == ["curves.png"]
