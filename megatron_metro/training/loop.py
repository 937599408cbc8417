"""fit(): load, step, report, validate, save. Reads top to bottom."""

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch

from megatron_metro.analysis.cost import step_flops
from megatron_metro.batch import Microbatch
from megatron_metro.checkpoint.folder import check_save_folder, find_step, read_document
from megatron_metro.config.batches import batch_size_at, count_steps, list_batch_sizes
from megatron_metro.config.cli import format_config, save_config
from megatron_metro.config.curriculum import objective_at, scheduled_values
from megatron_metro.config.errors import MetroError
from megatron_metro.config.fields import list_settings, read_value
from megatron_metro.config.files import check_writable
from megatron_metro.config.schema import CheckpointConfig, RunConfig
from megatron_metro.config.validation import data_parallel_size, require_training_inputs
from megatron_metro.data.loader import StepLoader, build_loaders
from megatron_metro.device import Device, activate
from megatron_metro.model.transformer_config import parameter_dtype
from megatron_metro.parallel.groups import ParallelGroups, initialise
from megatron_metro.parallel.stage_plan import plan_layout
from megatron_metro.tokenizer import Tokenizer, load_tokenizer
from megatron_metro.training.engine import Engine, StepResult
from megatron_metro.training.loading import load_checkpoint
from megatron_metro.training.optimizer import parameter_norm, set_learning_rate
from megatron_metro.training.reporting import Reporter, StepReport, check_tensorboard
from megatron_metro.training.saving import save_checkpoint
from megatron_metro.training.schedule import learning_rate
from megatron_metro.training.stages import list_stages
from megatron_metro.training.state import TrainState
from megatron_metro.training.throughput import StepTimer, peak_tflops, tflops_per_device


@dataclass(slots=True)
class Window:
    """What happened since the last log line."""

    results: list[StepResult] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)  # global; they grow during a ramp-up

    def mean_metrics(self) -> dict[str, float]:
        """Mean of each number over the steps."""
        # A step without a single masked token has no numbers of the generator's.
        names = dict.fromkeys(name for result in self.results for name in result.metrics)
        values = {name: [result.metrics[name] for result in self.results if name in result.metrics] for name in names}
        return {name: sum(found) / len(found) for name, found in values.items()}

    @property
    def num_skipped(self) -> int:
        return sum(not result.outcome.updated for result in self.results)

    @property
    def num_nan(self) -> int:
        """Steps whose gradient was not finite; under a dynamic loss scale that is no fault."""
        return sum(not math.isfinite(result.outcome.grad_norm) for result in self.results)


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
    start_iteration = find_start(run.checkpoint)
    stages = list_stages(run, start_iteration)
    for stage in stages:
        plan_layout(stage)
    loaders = [build_loaders(stage, tokenizer, rank // tp_size % dp_size, dp_size) for stage in stages]
    check_folders(run, start_iteration)
    timeout = timedelta(minutes=run.parallel.distributed_timeout_minutes)
    groups = initialise(run.parallel, device, timeout, list_agreed(run, tokenizer, *loaders[0]))
    try:
        train_stages(run, list(zip(stages, loaders, strict=True)), device, groups, tokenizer)
    except MetroError:  # on every rank alike; after any other error peers may wait in a collective, so just end
        groups.destroy()
        raise
    groups.destroy()


def train_stages(
    run: RunConfig,
    stages: Sequence[tuple[RunConfig, tuple[StepLoader, StepLoader | None]]],
    device: Device,
    groups: ParallelGroups,
    tokenizer: Tokenizer,
) -> None:
    """The stages of a run with their loaders, each with a model of its own, or up to where --exit-interval ends it."""
    for stage, (train_loader, valid_loader) in stages:
        with closing(train_loader):
            trainer = Trainer(stage, device, groups, tokenizer, train_loader, valid_loader)
            if run.checkpoint.save is not None and groups.rank == 0:  # not before --load is known to be whole
                save_config(run, Path(run.checkpoint.save) / "config.yaml")
            trainer.fit()
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
    stores = [
        source.documents.store
        for loader in (train_loader, valid_loader)
        for source in (loader.mixture.sources if loader is not None else ())
    ]
    texts = [f"{store.prefix}.idx with checksum {store.content_sha256[:12]}" for store in stores]
    return [*flags, f"a tokenizer with checksum {tokenizer.sha256[:12]}", *texts]


def find_start(checkpoint: CheckpointConfig) -> int:
    """The step that the run starts from: what --load holds, or 0."""
    step = find_step(checkpoint) if checkpoint.load is not None else None
    if step is None or checkpoint.finetune:
        return 0
    iteration: int = read_document(step)["train"]["iteration"]
    return iteration


def check_folders(run: RunConfig, start_iteration: int) -> None:
    """Find out before anything starts that --save is not beyond the start, and that what is written can be."""
    if run.checkpoint.save is not None:
        check_save_folder(run.checkpoint.save, start_iteration)
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
    ) -> None:
        self.run, self.device, self.groups = run, device, groups
        self.train_loader, self.valid_loader = train_loader, valid_loader
        train_iters = count_steps(run.training)
        assert train_iters is not None, "checked by require_training_inputs"
        self.train_iters = train_iters
        device.seed_all(run.training.seed, tp_rank=groups.tp_rank, pp_rank=groups.pp_rank, dp_rank=groups.dp_rank)
        self.engine = Engine(run, plan_layout(run), groups, parameter_dtype(run.optimizer), tokenizer.pad_id)
        self.state = self._load()
        self.reporter = Reporter(run, groups, train_iters=train_iters, start_iteration=self.state.iteration)
        self.timer = StepTimer(device.synchronize)

    def fit(self) -> None:
        """Train to the end of the run, then validate and save."""
        self._announce()
        self.reporter.phase("before the start of training step")
        window = Window()
        self.timer.start()
        while not self._is_finished():
            window.batch_sizes.append(batch_size_at(self.run.training, self.state.consumed_samples))
            window.results.append(self._step(window.batch_sizes[-1]))
            self.reporter.advance(self.state.iteration)
            if self.state.iteration % self.run.logging.log_interval == 0 or self._is_finished():
                self._report(window)
                window = Window()
            self._validate_and_save()
        self.timer.stop()
        self.reporter.phase("after training is done")
        self.reporter.close()

    def close(self) -> None:
        """Free the model, its gradients and the optimizer's state before another stage builds its own."""
        self.engine.close()
        del self.engine
        gc.collect()

    def _announce(self) -> None:
        self.reporter.message(format_config(self.run))
        self.reporter.message(f"layout: {self.engine.layout.format()}")
        self.reporter.message(self._describe_start())

    def _describe_start(self) -> str:
        """Where the run begins, and from what: a mistyped --load must not pass for a resumed run."""
        load, iteration = self.run.checkpoint.load, self.state.iteration
        if load is None:
            return "starting from random weights"
        if not self._has_loaded:
            return f"WARNING: --load {load} holds no checkpoint; starting from random weights"
        left = max(0, self.train_iters - iteration)
        return f"successfully loaded checkpoint from {load} at iteration {iteration}: {left} iterations are left"

    @property
    def is_told_to_exit(self) -> bool:
        """Whether --exit-interval ends the command at this step."""
        exit_interval = self.run.training.exit_interval
        return exit_interval is not None and self._has_stepped and self.state.iteration % exit_interval == 0

    def _is_finished(self) -> bool:
        return self.state.iteration >= self.train_iters or self.is_told_to_exit

    def _step(self, batch_size: int) -> StepResult:
        """One optimizer step on the next global batch; the rate is that of the updates completed before it."""
        microbatches = self._microbatches(self.train_loader, batch_size)
        set_learning_rate(self.engine.optimizer, self._learning_rate())
        self.engine.set_step(self.state.iteration)
        result = self.engine.train_step(microbatches)
        self._has_stepped = True
        self.state = replace(
            self.state,
            iteration=self.state.iteration + 1,
            skipped_iterations=self.state.skipped_iterations + (not result.outcome.updated),
            consumed_samples=self.state.consumed_samples + batch_size,
        )
        self._check_shared_weights()
        return result

    def _learning_rate(self) -> float:
        return learning_rate(self.run.optimizer, self.state.num_updates, self.train_iters)

    def _microbatches(self, loader: StepLoader, batch_size: int) -> list[Microbatch]:
        count = batch_size // (self.run.training.micro_batch_size * self.groups.dp_size)
        return [microbatch.to(self.device.torch_device) for microbatch in loader.next_step(count)]

    def _report(self, window: Window) -> None:
        seconds, last = self.timer.lap(), window.results[-1].outcome
        logging, optimizer = self.run.logging, self.run.optimizer
        tflops = None
        last_step = self.state.iteration - 1
        if logging.log_throughput:
            run = replace(self.run, objective=objective_at(self.run.objective, last_step))
            tflops = tflops_per_device(step_flops(run, sum(window.batch_sizes)), seconds, self.groups.world_size)
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
                seconds_per_iteration=seconds / len(window.results),
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
        validates = is_end or (training.eval_interval and iteration % training.eval_interval == 0)
        saves = is_end or (checkpoint.save_interval is not None and iteration % checkpoint.save_interval == 0)
        if not validates and not saves:
            return
        self.timer.stop()
        self.engine.synchronise_parameters()
        if validates and self.valid_loader is not None and training.eval_iters:
            self._validate(self.valid_loader)
        if saves and checkpoint.save is not None:
            self._save(checkpoint.save)
        self.timer.start()

    def _validate(self, loader: StepLoader) -> None:
        """The same held-out batches every time, all weighed by their counts."""
        loader.rewind(0)
        batch_size = list_batch_sizes(self.run.training)[-1]
        batches: Iterator[list[Microbatch]] = (
            self._microbatches(loader, batch_size) for _ in range(self.run.training.eval_iters)
        )
        metrics = self.engine.evaluate(batches)
        consumed = self.state.consumed_valid_samples + batch_size * self.run.training.eval_iters
        self.state = replace(self.state, consumed_valid_samples=consumed)
        self.reporter.validation(self.state.iteration, self.state.consumed_samples, metrics)

    def _save(self, folder: str) -> None:
        self.reporter.saving(self.state.iteration, folder)
        save_checkpoint(self.run, self.state, self.engine.chunks, self.engine.optimizer, self.groups)
        self.reporter.saved(self.state.iteration, folder)

    def _load(self) -> TrainState:
        """Where to go on: from --load where it holds a checkpoint, else from the start."""
        self._has_stepped = False
        state = None
        if self.run.checkpoint.load is not None:
            state = load_checkpoint(self.run, self.engine.chunks, self.engine.optimizer, self.groups)
        self._has_loaded = state is not None
        state = state or TrainState()
        if self.run.checkpoint.save is not None:
            check_save_folder(self.run.checkpoint.save, state.iteration)
        self.train_loader.rewind(state.consumed_samples)
        return state

    def _check_shared_weights(self) -> None:
        interval = self.run.parallel.check_weight_sharing_interval
        if interval and self.state.iteration % interval == 0:
            self.engine.synchronise_parameters()
            if differing := self.engine.shared.find_differing():
                raise MetroError(
                    f"--check-weight-sharing-interval: at iteration {self.state.iteration} the copies of "
                    f"{', '.join(differing)} differ between stages; go back to an earlier checkpoint"
                )
