"""Loss curves of runs: read `metrics.jsonl`, draw training and validation losses of several runs in one picture.

Runs that differ in their seed alone are a group: one mean with a band from the lowest to the highest of them.
"""

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_metro.analysis.budget import flops_until
from megatron_metro.config.cli import load_config
from megatron_metro.config.errors import ConfigError, DataError
from megatron_metro.config.files import publish, temporary_sibling

METRICS_FILE = "metrics.jsonl"
TRAINING = "train"  # the split of a training step; any other split is held-out text
VALIDATION = "validation"


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One number of one run over its steps, or over another measure of how far the run is."""

    steps: tuple[float, ...]
    values: tuple[float, ...]


RunCurves = dict[str, dict[str, Curve]]  # by split, then by name
Group = Sequence[RunCurves]  # of runs that differ in their seed alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """One number of a group, where every run of it has a value."""

    steps: tuple[float, ...]
    lowest: tuple[float, ...]
    mean: tuple[float, ...]
    highest: tuple[float, ...]


def read_group(path: Path, x_axis: str = "step") -> Group:
    """The run that a path names, or all runs in the folders right below it; `x_axis` is step or FLOPs.

    FLOPs are those of the run's config.yaml. Raises DataError, and ConfigError where they cannot be counted.
    """
    runs = [path]
    if path.is_dir() and not (path / METRICS_FILE).exists():
        runs = sorted(folder.parent for folder in path.glob(f"*/{METRICS_FILE}")) or [path]
    if x_axis == "step":
        return [read_curves(run) for run in runs]
    configs = [load_config((run if run.is_dir() else run.parent) / "config.yaml") for run in runs]
    return [move_steps(read_curves(run), partial(flops_until, config)) for run, config in zip(runs, configs)]


def name_groups(paths: Sequence[Path]) -> list[str]:
    """What tells the paths apart: each without the folders that all are in."""
    if len(paths) == 1:
        return [str(paths[0])]
    common = os.path.commonpath([os.path.abspath(path) for path in paths])
    return [os.path.relpath(os.path.abspath(path), common) for path in paths]


def move_steps(run: RunCurves, measure: Callable[[float], float]) -> RunCurves:
    """The same values over `measure(step)`, for example the FLOPs up to a step."""
    return {
        split: {
            name: Curve(steps=tuple(map(measure, curve.steps)), values=curve.values) for name, curve in named.items()
        }
        for split, named in run.items()
    }


def combine(curves: Sequence[Curve]) -> Band:
    """Mean, lowest and highest of the curves, at the steps that all of them have."""
    by_step = _join(curves)
    return Band(
        steps=tuple(by_step),
        lowest=tuple(map(min, by_step.values())),
        mean=tuple(map(statistics.fmean, by_step.values())),
        highest=tuple(map(max, by_step.values())),
    )


def format_table(groups: Mapping[str, Group], names: Sequence[str]) -> str:
    """A Markdown table of values on held-out text: mean and standard deviation over the runs of a group.

    They are those of the last step that all runs of the group have reached, and a dash where there is none; names that
    no run logs of held-out text have no column.
    """
    runs = [run for group in groups.values() for run in group]
    names = [name for name in names if any(name in run.get(VALIDATION, {}) for run in runs)]
    rows = [["run", "seeds", *(name.replace("_", " ") for name in names)]]
    rows.append([":---", *["---:"] * (len(names) + 1)])
    rows += [
        [label, str(len(group)), *(_format_last(group, name) for name in names)] for label, group in groups.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def read_curves(path: Path) -> RunCurves:
    """Every number of a `metrics.jsonl` (or of the run folder that holds one), by split and name.

    Lines written again after a resume replace the earlier ones of the same step. A last line cut short by a kill is
    left out; any other broken line is an error naming file and line.
    """
    path = path / METRICS_FILE if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"{path}: cannot be read ({cause}); give the folder of a run") from error
    points: dict[str, dict[str, dict[int, float]]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step, split = record.pop("iteration"), record.pop("split")
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(f'{path}, line {number}: no JSON object with "iteration" and "split"; remove it') from error
        for name, value in record.items():
            if isinstance(value, int | float):  # null stands for what was not finite
                points.setdefault(split, {}).setdefault(name, {})[step] = float(value)
    if not points:
        raise DataError(f"{path}: no logged step; give the {METRICS_FILE} of a run that has logged")
    return {split: {name: _curve(values) for name, values in named.items()} for split, named in points.items()}


def choose_names(runs: Sequence[RunCurves], wanted: Sequence[str] | None = None) -> list[str]:
    """The wanted numbers, or else every loss, in the order in which the runs log them."""
    logged = list(dict.fromkeys(name for run in runs for named in run.values() for name in named))
    names = [name for name in logged if name.endswith("_loss")] if wanted is None else list(wanted)
    missing = [name for name in names if name not in logged]
    if missing or not names:
        raise DataError(f"--names: no run logs {', '.join(missing) or 'a loss'}; choose among {', '.join(logged)}")
    return names


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at every point; fewer at the start."""
    means = []
    for end in range(1, len(values) + 1):
        last = values[max(0, end - window) : end]
        means.append(sum(last) / len(last))
    return means


def plot_runs(
    groups: Mapping[str, Group], names: Sequence[str], path: Path, *, window: int = 1, x_axis: str = "step"
) -> None:
    """Draw one panel per name and one colour per group: training as a line, held-out text dashed with dots.

    The PNG appears under its name only when it is whole.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (an optional package)
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError('matplotlib is not installed; install the extra "logging" to draw curves') from error

    num_columns = min(2, len(names))
    num_rows = -(-len(names) // num_columns)
    figure = Figure(figsize=(6.0 * num_columns, 3.6 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    for panel, name in zip(panels, names):
        for number, (label, group) in enumerate(groups.items()):
            _draw_group(panel, group, name, label, f"C{number}", window)
        panel.set(title=name.replace("_", " "), xlabel=x_axis)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.supxlabel("lines: training; dashes and dots: held-out text", fontsize="small")
    with temporary_sibling(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
        publish(partial, path)


def _draw_group(panel: Any, group: Group, name: str, label: str, color: str, window: int) -> None:
    """Every split in which a run of the group has the number, with one entry in the legend."""
    for split in dict.fromkeys(split for run in group for split in run if name in run[split]):
        is_training = split == TRAINING
        curves = [run.get(split, {}).get(name, Curve(steps=(), values=())) for run in group]
        smoothed = [smooth(curve.values, window if is_training else 1) for curve in curves]
        band = combine([Curve(steps=c.steps, values=tuple(values)) for c, values in zip(curves, smoothed)])
        style = "-" if is_training else "o--"
        panel.plot(band.steps, band.mean, style, color=color, label=label, markersize=3, linewidth=1.2)
        panel.fill_between(band.steps, band.lowest, band.highest, color=color, alpha=0.2, linewidth=0)
        label = "_nolegend_"


def _format_last(group: Group, name: str) -> str:
    curves = [run.get(VALIDATION, {}).get(name, Curve(steps=(), values=())) for run in group]
    by_step = _join(curves)
    if not by_step:
        return "-"
    last = by_step[max(by_step)]
    spread = f" ± {statistics.stdev(last):.3f}" if len(last) > 1 else ""
    return f"{statistics.fmean(last):.3f}{spread}"


def _join(curves: Sequence[Curve]) -> dict[float, list[float]]:
    """The values of all curves at each step that all of them have."""
    by_step = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
    common = set(by_step[0]).intersection(*by_step[1:])
    return {step: [values[step] for values in by_step] for step in sorted(common)}


def _curve(values: dict[int, float]) -> Curve:
    steps = sorted(values)
    return Curve(steps=tuple(steps), values=tuple(values[step] for step in steps))
