"""Loss curves of runs: read `metrics.jsonl`, draw training and validation losses of several runs in one picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_metro.config.errors import ConfigError, DataError
from megatron_metro.config.files import publish, temporary_sibling

METRICS_FILE = "metrics.jsonl"
TRAINING = "train"  # the split of a training step; any other split is held-out text


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One number of one run over its steps."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


RunCurves = dict[str, dict[str, Curve]]  # by split, then by name


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


def plot_runs(runs: Mapping[str, RunCurves], names: Sequence[str], path: Path, *, window: int = 1) -> None:
    """Draw one panel per name and one colour per run: training as a line, held-out text dashed with dots.

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
        for number, (run, splits) in enumerate(runs.items()):
            for split, named in splits.items():
                if name in named:
                    curve, is_training = named[name], split == TRAINING
                    panel.plot(
                        curve.steps,
                        smooth(curve.values, window if is_training else 1),
                        "-" if is_training else "o--",
                        color=f"C{number}",
                        label=run if is_training else f"{run} ({split})",
                        markersize=3,
                        linewidth=1.2,
                    )
        panel.set(title=name.replace("_", " "), xlabel="step")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    with temporary_sibling(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
        publish(partial, path)


def _curve(values: dict[int, float]) -> Curve:
    steps = sorted(values)
    return Curve(steps=tuple(steps), values=tuple(values[step] for step in steps))
