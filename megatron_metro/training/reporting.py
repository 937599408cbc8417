"""What a run tells: Megatron's console lines, `metrics.jsonl`, TensorBoard, a progress bar. The last rank speaks."""

import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from megatron_metro.config.errors import ConfigError
from megatron_metro.config.files import refusing_writes
from megatron_metro.config.schema import LoggingConfig, RunConfig
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.training.throughput import format_duration

METRICS_FILE = "metrics.jsonl"
ANOMALIES_FILE = "anomalies.jsonl"
# Terms whose exponential is a perplexity; Megatron prints one for every value.
_PERPLEXITIES = ("lm loss", "mlm loss")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """One logged step; means and counts are over the steps since the last one."""

    iteration: int
    consumed_samples: int
    learning_rate: float  # of the next update, as in Megatron's log
    global_batch_size: int
    metrics: Mapping[str, float]  # by log name, losses in nats; all are printed, whatever their value
    loss_scale: float
    grad_norm: float
    params_norm: float | None = None
    seconds_per_iteration: float
    tflops_per_device: float | None = None
    peak_tflops: float | None = None  # None prints no MFU
    num_skipped: int = 0
    num_nan: int = 0

    @property
    def mfu(self) -> float | None:
        """Share of the device's peak, in percent."""
        if self.tflops_per_device is None or self.peak_tflops is None:
            return None
        return 100.0 * self.tflops_per_device / self.peak_tflops


def check_tensorboard(logging: LoggingConfig) -> None:
    """Raise ConfigError when TensorBoard is asked for and not installed; call before anything starts."""
    if logging.tensorboard_dir is not None and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            f"--tensorboard-dir {logging.tensorboard_dir}: the package tensorboard is not installed; "
            "pip install tensorboard, or leave the flag out"
        )


def format_step(report: StepReport, train_iters: int, now: datetime) -> str:
    """Megatron's log line: its fields, order and number formats; MFU and time left are ours."""
    fields = [
        f" [{now:%Y-%m-%d %H:%M:%S}] iteration {report.iteration:8d}/{train_iters:8d}",
        f"consumed samples: {report.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {report.seconds_per_iteration * 1000.0:.1f}",
    ]
    if report.tflops_per_device is not None:
        # Megatron's one decimal, but for a CPU, which would read 0.0.
        precision = ".1f" if report.tflops_per_device >= 1 else ".2g"
        fields.append(f"throughput per GPU (TFLOP/s/GPU): {report.tflops_per_device:{precision}}")
    if report.mfu is not None:
        fields.append(f"MFU: {report.mfu:.1f} %")
    if report.tflops_per_device is not None:
        left = max(0, train_iters - report.iteration) * report.seconds_per_iteration
        fields.append(f"time left: {format_duration(left)}")
    fields.append(f"learning rate: {report.learning_rate:.6E}")
    fields.append(f"global batch size: {report.global_batch_size:5d}")
    fields += [f"{name}: {value:.6E}" for name, value in report.metrics.items()]
    fields.append(f"loss scale: {report.loss_scale:.1f}")
    fields.append(f"grad norm: {report.grad_norm:.3f}")
    if report.params_norm is not None:
        fields.append(f"params norm: {report.params_norm:.3f}")
    fields.append(f"number of skipped iterations: {report.num_skipped:3d}")
    fields.append(f"number of nan iterations: {report.num_nan:3d}")
    return " | ".join(fields) + " |"


def format_validation(iteration: int, metrics: Mapping[str, float], split: str = "validation") -> str:
    """Megatron's boxed line; perplexities only of the language-model losses."""
    fields = [f" {split} loss at iteration {iteration}"]
    for name, value in metrics.items():
        fields.append(f"{name} value: {value:.6E}")
        if name in _PERPLEXITIES:
            fields.append(f"{name} PPL: {math.exp(min(20.0, value)):.6E}")
    line = " | ".join(fields) + " | "
    ruler = "-" * (len(line) + 1)
    return f"{ruler}\n{line}\n{ruler}"


class Reporter:
    """The voice of a run: all methods may be called on every rank, one rank writes.

    `start_iteration` is the step the run goes on from: later lines of an earlier attempt leave `metrics.jsonl`.
    """

    def __init__(
        self,
        config: RunConfig,
        groups: ParallelGroups,
        *,
        train_iters: int,
        start_iteration: int,
        stream: TextIO = sys.stdout,
    ) -> None:
        self._train_iters, self._stream, self._groups = train_iters, stream, groups
        self._speaks = groups.rank == groups.world_size - 1
        self._folder: Path | None = None
        self._tensorboard: Any = None
        self._bar: Any = None
        if not self._speaks:
            return
        if config.checkpoint.save is not None:
            self._folder = Path(config.checkpoint.save)
            self._folder.mkdir(parents=True, exist_ok=True)
            for name in (METRICS_FILE, ANOMALIES_FILE):
                drop_later_lines(self._folder / name, start_iteration)
        if config.logging.tensorboard_dir is not None:
            self._tensorboard = _open_tensorboard(config.logging.tensorboard_dir, start_iteration)
        if config.logging.progress_bar and sys.stderr.isatty():
            self._bar = tqdm(total=train_iters, initial=start_iteration, unit="step", dynamic_ncols=True)

    def message(self, text: str) -> None:
        """A line (or several) of text."""
        if not self._speaks:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def phase(self, name: str) -> None:
        """Megatron's marker of a new phase, with the time."""
        self.message(f"[{name}] datetime: {datetime.now():%Y-%m-%d %H:%M:%S} ")

    def advance(self, iteration: int) -> None:
        """Move the progress bar; call after every step."""
        if self._bar is not None:
            self._bar.update(iteration - self._bar.n)

    def step(self, report: StepReport) -> None:
        """One logged step, everywhere."""
        if not self._speaks:
            return
        self.message(format_step(report, self._train_iters, datetime.now()))
        if self._bar is not None and "lm loss" in report.metrics:
            self._bar.set_postfix({"lm loss": f"{report.metrics['lm loss']:.4f}"})
        extra = {
            "params_norm": report.params_norm,
            "tflops_per_device": report.tflops_per_device,
            "mfu_percent": report.mfu,
        }
        self._append(
            {
                "iteration": report.iteration,
                "split": "train",
                "consumed_samples": report.consumed_samples,
                "lr": report.learning_rate,
                "grad_norm": report.grad_norm,
                **_underscored(report.metrics),
                "loss_scale": report.loss_scale,
                "global_batch_size": report.global_batch_size,
                "seconds_per_iteration": report.seconds_per_iteration,
                "skipped_iterations": report.num_skipped,
                "nan_iterations": report.num_nan,
                **{name: value for name, value in extra.items() if value is not None},
            }
        )
        self._draw_step(report)

    def validation(
        self, iteration: int, consumed_samples: int, metrics: Mapping[str, float], split: str = "validation"
    ) -> None:
        """Results on held-out text."""
        if not self._speaks:
            return
        self.message(format_validation(iteration, metrics, split))
        self._append(
            {
                "iteration": iteration,
                "split": split,
                "consumed_samples": consumed_samples,
                **_underscored(metrics),
            }
        )
        self._draw({f"{name} {split}": value for name, value in metrics.items()}, iteration)

    def anomaly(self, text: str, entry: dict[str, Any]) -> None:
        """A step that was not as others: a line, and an entry of `anomalies.jsonl`."""
        if self._speaks:
            self.message(text)
            self._append(_underscored(entry), ANOMALIES_FILE)

    def saving(self, iteration: int, folder: str) -> None:
        """Before a checkpoint is written."""
        self.message(f"saving checkpoint at iteration {iteration:7d} to {folder} in torch_dist format")

    def saved(self, iteration: int, folder: str) -> None:
        """Once a checkpoint can be resumed from."""
        groups = self._groups
        place = f"[ t {groups.tp_rank + 1}/{groups.tp_size}, p {groups.pp_rank + 1}/{groups.pp_size} ]"
        self.message(f"  successfully saved checkpoint from iteration {iteration:7d} to {folder} {place}")

    def close(self) -> None:
        """Write out what is buffered and end the progress bar."""
        if self._bar is not None:
            self._bar.close()
        if self._tensorboard is not None:
            with refusing_writes(Path(self._tensorboard.log_dir)):
                self._tensorboard.close()

    def _append(self, entry: dict[str, Any], name: str = METRICS_FILE) -> None:
        if self._folder is None:
            return
        with refusing_writes(self._folder / name), (self._folder / name).open("a", encoding="utf-8") as file:
            file.write(_to_json(entry) + "\n")

    def _draw_step(self, report: StepReport) -> None:
        # Megatron's names.
        scalars = {
            "learning-rate": report.learning_rate,
            "batch-size": report.global_batch_size,
            **report.metrics,
            "loss-scale": report.loss_scale,
            "grad-norm": report.grad_norm,
            "params-norm": report.params_norm,
            "iteration-time": report.seconds_per_iteration,
            "throughput": report.tflops_per_device,
        }
        self._draw({name: value for name, value in scalars.items() if value is not None}, report.iteration)

    def _draw(self, scalars: Mapping[str, float], iteration: int) -> None:
        if self._tensorboard is None:
            return
        with refusing_writes(Path(self._tensorboard.log_dir)):
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, iteration)


def drop_later_lines(path: Path, iteration: int) -> None:
    """Keep the whole lines of a metrics file up to an iteration; the file is replaced at once or not at all."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _is_up_to(line, iteration)]
    if kept == lines:
        return
    replacement = path.with_name(f"{path.name}.partial")
    with replacement.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    replacement.replace(path)


def _is_up_to(line: str, iteration: int) -> bool:
    """False also for a line that a crash cut short."""
    if not line.endswith("\n"):
        return False
    try:
        return bool(json.loads(line)["iteration"] <= iteration)
    except (ValueError, KeyError, TypeError):
        return False


def _underscored(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name.replace(" ", "_"): value for name, value in metrics.items()}


def _to_json(entry: Mapping[str, Any]) -> str:
    """JSON has no nan and no inf; they become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in entry.items()
    }
    return json.dumps(finite, allow_nan=False)


def _open_tensorboard(folder: str, start_iteration: int) -> Any:
    """A writer that hides steps a resumed run will write again."""
    # Only where it is asked for: importing it takes seconds and the package is optional.
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

    return SummaryWriter(folder, purge_step=start_iteration + 1 if start_iteration else None)
