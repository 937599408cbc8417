"""fit(): load, step, report, validate, save. Reads top to bottom."""

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from megatron_metro.analysis.cost import step_flops
from megatron_metro.batch import Microbatch
from megatron_metro.checkpoint.folder import check_save_folder, set_aside_damaged
from megatron_metro.checkpoint.lock import SaveLock
from megatron_metro.checkpoint.start import find_start
from megatron_metro.config.batches import batch_size_at, count_steps, list_batch_sizes
from megatron_metro.config.cli import format_config, save_config
from megatron_metro.config.curriculum import objective_at, scheduled_values
from megatron_metro.config.errors import MetroError, NumericError
from megatron_metro.config.fields import list_settings, read_value
from megatron_metro.config.files import check_writable
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.validation import data_parallel_size, require_training_inputs
from megatron_metro.data.loader import StepLoader, build_loaders
from megatron_metro.device import Device, activate
from megatron_metro.model.transformer_config import parameter_dtype
from megatron_metro.parallel.agreement import on_first_rank
from megatron_metro.parallel.groups import ParallelGroups, initialise
from megatron_metro.parallel.stage_plan import plan_layout
from megatron_metro.tokenizer import Tokenizer, load_tokenizer
from megatron_metro.training.anomalies import AnomalyGuard
from megatron_metro.training.engine import Engine, StepResult
from megatron_metro.training.identity import check_identity, describe_identity
from megatron_metro.training.loading import load_checkpoint
from megatron_metro.training.optimizer import StepOutcome, parameter_norm, set_learning_rate
from megatron_metro.training.reporting import Reporter, StepReport, check_tensorboard
from megatron_metro.training.saving import Saver
from megatron_metro.training.schedule import learning_rate
from megatron_metro.training.stages import list_stages
from megatron_metro.training.state import TrainState
from megatron_metro.training.supervision import Supervisor, stopped_by, supervise
from megatron_metro.training.throughput import StepTimer, peak_tflops, tflops_per_device


@dataclass(slots=True)
class Window:
    """What happened since the last log line."""

    results: list[StepResult] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)  # global; they grow during a ramp-up
    num_restored: int = 0  # steps at the beginning that another process took, in a time not known

    @classmethod
    def restore(cls, records: Sequence[Mapping[str, Any]]) -> "Window":
        """The window that `list_records` described, from a checkpoint."""
        results = [StepResult(r["metrics"], StepOutcome(**r["outcome"]), r["num_tokens"]) for r in records]
        return cls(results, [record["batch_size"] for record in records], len(records))

    def list_records(self) -> list[dict[str, Any]]:
        """The steps as plain JSON."""
        return [{**asdict(result), "batch_size": size} for result, size in zip(self.results, self.batch_sizes)]

    def mean_metrics(self) -> dict[str, float]:
        """Mean of each number over the steps where it was finite, which says nothing only when it never was."""
        # A step without a single masked token has no numbers of the generator's.
        names = dict.fromkeys(name for result in self.results for name in result.metrics)
        values = {name: [result.metrics[name] for result in self.results if name in result.metrics] for name in names}
        means = {}
        for name, found in values.items():
            finite = [value for value in found if math.isfinite(value)]
            means[name] = sum(finite) / len(finite) if finite else math.nan
        return means

    @property
    def num_skipped(self) -> int:
        return sum(not result.outcome.updated for result in self.results)

    @property
    def num_nan(self) -> int:
        """Steps whose losses or gradients were not finite; under a dynamic loss scale that is no fault."""
        return sum(not result.is_finite for result in self.results)


def pretrain(run: RunConfig, rank: int, world_size: int) -> None:
    """Train the run that a valid, resolved configuration describes; every process of the job calls it.

    All that can be wrong with files and flags is found before a process group starts. Raises MetroErrors.
    """
    require_training_inputs(run)
    check_tensorboard(run.logging)
    device = activate(run.training.device, run.parallel.distributed_backend)
    if device.kind == "cpu":
        torch.set_float32_matmul_precision(run.training.cpu_matmul_precision)
    torch.use_deterministic_algorithms(run.training.deterministic_mode)
    tokenizer = load_tokenizer(run.tokenizer, run.model.vocab_size)
    run = fit_to_machine(run, tokenizer, device)
    tp_size = run.parallel.tensor_model_parallel_size
    dp_size = data_parallel_size(run.parallel, world_size)
    start = find_start(run.checkpoint)
    stages = list_stages(run, start.iteration)
    for stage in stages:
        plan_layout(stage)
    loaders = [build_loaders(stage, tokenizer, rank // tp_size % dp_size, dp_size) for stage in stages]
    check_identity(stages[0], describe_identity(tokenizer, loaders[0][0]), start)
    check_folders(run, start.iteration)
    # The watchdog knows more than a collective that has waited in vain, so it comes first.
    timeout = timedelta(minutes=1.1 * run.parallel.distributed_timeout_minutes, seconds=10)
    groups = initialise(run.parallel, device, timeout, list_agreed(run, tokenizer, *loaders[0]))
    try:
        with ExitStack() as held:
            if run.checkpoint.save is not None:  # before anything of this job is written there
                lock = held.enter_context(closing(SaveLock(Path(run.checkpoint.save))))
                on_first_rank(lock.acquire)
            supervisor = held.enter_context(supervise(run, groups))
            train_stages(run, list(zip(stages, loaders, strict=True)), device, groups, tokenizer, supervisor)
    except MetroError:  # after any other error peers may wait in a collective, so just end
        groups.destroy()
        raise
    groups.destroy()


def train_stages(
    run: RunConfig,
    stages: Sequence[tuple[RunConfig, tuple[StepLoader, StepLoader | None]]],
    device: Device,
    groups: ParallelGroups,
    tokenizer: Tokenizer,
    supervisor: Supervisor,
) -> None:
    """The stages of a run with their loaders, each with a model of its own, or up to where it is told to exit."""
    for stage, (train_loader, valid_loader) in stages:
        with closing(train_loader):
            trainer = Trainer(stage, device, groups, tokenizer, train_loader, valid_loader, supervisor)
            if run.checkpoint.save is not None and groups.rank == 0:  # not before --load is known to be whole
                save_config(run, Path(run.checkpoint.save) / "config.yaml")
            try:
                trainer.fit()
            except NumericError:  # on every rank alike, so the save that is under way can still be finished
                trainer.saver.wait()
                raise
            trainer.close()
        if trainer.is_told_to_exit:
            return


def fit_to_machine(run: RunConfig, tokenizer: Tokenizer, device: Device) -> RunConfig:
    """The run with what a configuration alone cannot know: the tokenizer's vocabulary size, workers that suit."""
    num_workers = run.data.num_workers
    if num_workers is None:
        num_workers = 2 if device.kind == "cuda" else 0
    return replace(
        run,
        model=replace(run.model, vocab_size=run.model.vocab_size or tokenizer.vocab_size),
        data=replace(run.data, num_workers=num_workers),
    )


def list_agreed(
    run: RunConfig, tokenizer: Tokenizer, train_loader: StepLoader, valid_loader: StepLoader | None
) -> list[str]:
    """What must be the same on all ranks: every flag, the tokenizer, the data that each of them reads by itself."""
    flags = [f"{setting.flag} {read_value(run, setting)}" for setting in list_settings().values()]
    origins = [
        source.origin
        for loader in (train_loader, valid_loader)
        for source in (loader.mixture.sources if loader is not None else ())
    ]
    texts = [f"{origin.path} with checksum {origin.sha256[:12]}" for origin in origins]
    return [*flags, f"a tokenizer with checksum {tokenizer.sha256[:12]}", *texts]


def check_folders(run: RunConfig, start_iteration: int) -> None:
    """Find out before anything starts that --save is not beyond the start, and that what is written can be."""
    if run.checkpoint.save is not None:
        check_save_folder(run.checkpoint, start_iteration)
        check_writable(Path(run.checkpoint.save), "--save")
    if run.logging.tensorboard_dir is not None:
        check_writable(Path(run.logging.tensorboard_dir), "--tensorboard-dir")


class Trainer:
    """One rank's part of a run."""

    def __init__(
        self,
        run: RunConfig,
        device: Device,
        groups: ParallelGroups,
        tokenizer: Tokenizer,
        train_loader: StepLoader,
        valid_loader: StepLoader | None,
        supervisor: Supervisor,
    ) -> None:
        self.run, self.device, self.groups = run, device, groups
        self.supervisor, self.progress = supervisor, supervisor.progress
        self.train_loader, self.valid_loader = train_loader, valid_loader
        train_iters = count_steps(run.training)
        assert train_iters is not None, "checked by require_training_inputs"
        self.train_iters = train_iters
        self.progress.enter("building")
        device.seed_all(run.training.seed, tp_rank=groups.tp_rank, pp_rank=groups.pp_rank, dp_rank=groups.dp_rank)
        self.engine = Engine(run, plan_layout(run), groups, parameter_dtype(run.optimizer), tokenizer.pad_id)
        self.window = Window()
        self.engine.wants_stop, self.engine.tick = supervisor.stop_request.is_wanted, self.progress.tick
        self.progress.enter("loading")
        self.state = self._load()
        self.progress.step = self.state.iteration
        self._is_stopped = False
        self._stop_signal: str | None = None
        self.reporter = Reporter(run, groups, train_iters=train_iters, start_iteration=self.state.iteration)
        self.guard = AnomalyGuard(run, self.engine, self.reporter)
        self.timer = StepTimer(device.synchronize)
        identity = describe_identity(tokenizer, train_loader)
        self.saver = Saver(run, groups, identity, self._announce_saved)

    def fit(self) -> None:
        """Train to the end of the run, then validate and save."""
        self._announce()
        self.reporter.phase("before the start of training step")
        self.timer.start()
        while not self._is_finished():
            batch_size = batch_size_at(self.run.training, self.state.consumed_samples)
            self.window.results.append(self._step(batch_size))
            self.window.batch_sizes.append(batch_size)
            self.reporter.advance(self.state.iteration)
            self._heed_stop()
            if self.state.iteration % self.run.logging.log_interval == 0 or self._is_finished():
                self._report(self.window)
                self.window = Window()
            self._validate_and_save()
            self.saver.poll()
        self.saver.wait()
        self.timer.stop()
        self.reporter.phase("after training is done")
        self.reporter.close()
        if self._stop_signal is not None:
            raise stopped_by(self._stop_signal, self.run.checkpoint.save, self.state.iteration)

    def close(self) -> None:
        """Free the model, its gradients and the optimizer's state before another stage builds its own."""
        self.engine.close()
        del self.engine, self.guard
        gc.collect()

    def _announce(self) -> None:
        self.reporter.message(format_config(self.run))
        self.reporter.message(f"layout: {self.engine.layout.format()}")
        self.reporter.message(self._describe_start())

    def _describe_start(self) -> str:
        """Where the run begins, and from what: a mistyped --load must not pass for a resumed run."""
        load, iteration = self.run.checkpoint.load, self.state.iteration
        if load is None and not self._has_loaded:
            return "starting from random weights"
        if not self._has_loaded:
            return f"WARNING: --load {load} holds no checkpoint; starting from random weights"
        load = load or self.run.checkpoint.pretrained_checkpoint
        left = max(0, self.train_iters - iteration)
        loaded = f"successfully loaded checkpoint from {load} at iteration {iteration}: {left} iterations are left"
        if left:
            return loaded
        nothing = "nothing is trained and nothing is saved"
        return f"{loaded}; {nothing}; raise --train-iters {self.train_iters} or --train-samples to go on"

    @property
    def is_told_to_exit(self) -> bool:
        """Whether a signal, --exit-duration-in-mins or --exit-interval ends the command at this step."""
        if self._is_stopped:
            return True
        exit_interval = self.run.training.exit_interval
        return exit_interval is not None and self._has_stepped and self.state.iteration % exit_interval == 0

    def _is_finished(self) -> bool:
        return self.state.iteration >= self.train_iters or self.is_told_to_exit

    def _heed_stop(self) -> None:
        """Find out why, once a step or a validation batch has brought word that all are to stop."""
        if self.engine.is_told_to_stop and not self._is_stopped:
            self._is_stopped = True
            self._stop_signal = self.supervisor.agree_on_stop()
            why = self._stop_signal or "--exit-duration-in-mins"
            self.reporter.message(f"{why}: stopping at iteration {self.state.iteration}")

    def _step(self, batch_size: int) -> StepResult:
        """One optimizer step on the next global batch; the rate is that of the updates completed before it."""
        self.progress.enter("data")
        microbatches = self._microbatches(self.train_loader, batch_size)
        self.progress.enter("step")
        set_learning_rate(self.engine.optimizer, self._learning_rate())
        self.engine.set_step(self.state.iteration)
        result, self.state = self.guard.step(self.state, microbatches, batch_size)
        self._has_stepped = True
        self.supervisor.step_is_done(self.state.iteration)
        self._check_shared_weights()
        if self._is_finished():
            self.guard.check_end(self.state)
        return result

    def _learning_rate(self) -> float:
        return learning_rate(self.run.optimizer, self.state.num_updates, self.train_iters)

    def _microbatches(self, loader: StepLoader, batch_size: int) -> list[Microbatch]:
        count = batch_size // (self.run.training.micro_batch_size * self.groups.dp_size)
        return [microbatch.to(self.device.torch_device) for microbatch in loader.next_step(count)]

    def _report(self, window: Window) -> None:
        self.progress.enter("report")
        for rank in self.supervisor.find_slow_ranks():
            self.reporter.message(f"WARNING: rank {rank} is slow: the other ranks wait for it most of the time")
        seconds, last = self.timer.lap(), window.results[-1].outcome
        timed_sizes = window.batch_sizes[window.num_restored :]
        logging, optimizer = self.run.logging, self.run.optimizer
        tflops = None
        last_step = self.state.iteration - 1
        if logging.log_throughput:
            run = replace(self.run, objective=objective_at(self.run.objective, last_step))
            tflops = tflops_per_device(step_flops(run, sum(timed_sizes)), seconds, self.groups.world_size)
        self.reporter.step(
            StepReport(
                iteration=self.state.iteration,
                consumed_samples=self.state.consumed_samples,
                learning_rate=self._learning_rate(),
                global_batch_size=window.batch_sizes[-1],
                metrics=window.mean_metrics() | scheduled_values(self.run.objective, last_step),
                loss_scale=last.loss_scale,
                grad_norm=last.grad_norm,
                params_norm=parameter_norm(self.engine.optimizer) if logging.log_params_norm else None,
                seconds_per_iteration=seconds / len(timed_sizes),
                tflops_per_device=tflops,
                peak_tflops=peak_tflops(
                    torch.cuda.get_device_name() if self.device.kind == "cuda" else None,
                    is_half_precision=optimizer.bf16 or optimizer.fp16,
                    override=logging.peak_tflops,
                ),
                num_skipped=window.num_skipped,
                num_nan=window.num_nan,
            )
        )

    def _validate_and_save(self) -> None:
        training, checkpoint, iteration = self.run.training, self.run.checkpoint, self.state.iteration
        is_end = self._is_finished()
        # Who has sent a signal will not wait for long.
        validates = not self._is_stopped and (
            is_end or (training.eval_interval and iteration % training.eval_interval == 0)
        )
        saves = is_end or (checkpoint.save_interval is not None and iteration % checkpoint.save_interval == 0)
        if not validates and not saves:
            return
        self.timer.stop()
        self.engine.synchronise_parameters()
        if validates and self.valid_loader is not None and training.eval_iters:
            self._validate(self.valid_loader)
        if (saves or self._is_stopped) and checkpoint.save is not None:
            self._save(checkpoint.save)
        self.timer.start()

    def _validate(self, loader: StepLoader) -> None:
        """The same held-out batches every time, all weighed by their counts."""
        self.progress.enter("validation")
        loader.rewind(0)
        batch_size = list_batch_sizes(self.run.training)[-1]
        batches: Iterator[list[Microbatch]] = (
            self._microbatches(loader, batch_size) for _ in range(self.run.training.eval_iters)
        )
        metrics = self.engine.evaluate(batches)
        self._heed_stop()
        if self._is_stopped:
            return
        consumed = self.state.consumed_valid_samples + batch_size * self.run.training.eval_iters
        self.state = replace(self.state, consumed_valid_samples=consumed)
        self.reporter.validation(self.state.iteration, self.state.consumed_samples, metrics)

    def _save(self, folder: str) -> None:
        self.progress.enter("save")
        self.reporter.saving(self.state.iteration, folder)
        state = replace(self.state, unreported=self.window.list_records())
        self.saver.save(state, self.engine.chunks, self.engine.optimizer)

    def _announce_saved(self, iteration: int) -> None:
        self.progress.last_good = iteration
        self.reporter.saved(iteration, self.run.checkpoint.save or "")

    def _load(self) -> TrainState:
        """Where to go on: from --load where it holds a checkpoint, else from the start."""
        self._has_stepped = False
        state = load_checkpoint(self.run, self.engine.chunks, self.engine.optimizer, self.groups)
        self._has_loaded = state is not None
        if state is not None:
            self.progress.last_good = state.iteration
        state = state or TrainState()
        iteration = state.iteration
        on_first_rank(lambda: set_aside_damaged(self.run.checkpoint, iteration))
        check_save_folder(self.run.checkpoint, iteration)
        self.window = Window.restore(state.unreported)
        self.train_loader.rewind(state.consumed_samples)
        return replace(state, unreported=())

    def _check_shared_weights(self) -> None:
        interval = self.run.parallel.check_weight_sharing_interval
        if interval and self.state.iteration % interval == 0:
            self.engine.synchronise_parameters()
            if differing := self.engine.shared.find_differing():
                raise MetroError(
                    f"--check-weight-sharing-interval: at iteration {self.state.iteration} the copies of "
                    f"{', '.join(differing)} differ between stages; go back to an earlier checkpoint"
                )
