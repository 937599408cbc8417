"""One optimizer step, or one validation batch, through megatron-core's unmodified schedules.

Everything that differs between layouts is chosen here once, when the engine is built; a step then reads the same for
one process and for a pipeline.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed import finalize_model_grads as core_finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_metro.batch import Microbatch, MicrobatchShape
from megatron_metro.config.curriculum import objective_at
from megatron_metro.config.payload import payload_rows
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.terms import target_kind
from megatron_metro.losses.step import StepLosses, count_tokens
from megatron_metro.model.build import build_pieces
from megatron_metro.parallel.communicator import StaticShapeCommunicator
from megatron_metro.parallel.groups import ParallelGroups, all_reduce_sum
from megatron_metro.parallel.layout import StageLayout, shared_weights
from megatron_metro.parallel.shared_weights import SharedWeights
from megatron_metro.training.optimizer import StepOutcome, build_optimizer, optimizer_step, wrap


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did; `metrics` has the fixed log names and is equal on all ranks."""

    metrics: dict[str, float]
    outcome: StepOutcome
    num_tokens: int = 0  # of text in the global batch, padding excluded

    @property
    def is_finite(self) -> bool:
        """Whether all losses and gradients of all ranks are."""
        return math.isfinite(self.outcome.grad_norm) and all(map(math.isfinite, self.metrics.values()))


def accept_all(metrics: Mapping[str, float]) -> bool:
    """Lets every step with finite losses and gradients change the weights."""
    return True


class Engine:
    """The model of one rank with its optimizer, ready to run steps."""

    def __init__(
        self, run: RunConfig, layout: StageLayout, groups: ParallelGroups, dtype: torch.dtype, pad_id: int
    ) -> None:
        self.run, self.layout, self.groups = run, layout, groups
        self.objective = objective_at(run.objective, 0)
        self.pieces = build_pieces(run, layout, groups, dtype, pad_id)
        # Before the data-parallel wrapper, which reads the marks of shared weights when it lays out its buckets.
        self.shared = SharedWeights(shared_weights(layout, run.model), layout, self.pieces, groups)
        self.chunks = wrap(run, self.pieces, groups)
        self.optimizer = build_optimizer(run, self.chunks, groups)
        self.core_config = get_model_config(self.chunks[0])
        self.communicator = StaticShapeCommunicator(groups.pp_group, self.core_config) if groups.pp_size > 1 else None
        self._connect_hooks()
        self.wants_stop: Callable[[], bool] = lambda: False  # asked on every rank in every step and validation batch
        self.tick: Callable[[], None] = lambda: None  # called as each microbatch begins
        self.is_told_to_stop = False  # whether any rank wanted it in the last one; the same on all ranks
        self._own_sums = torch.zeros(0)

    def set_step(self, step: int) -> None:
        """Take up the loss weights of the step that follows `step` completed ones."""
        self.objective = objective_at(self.run.objective, step)

    def train_step(
        self, microbatches: Sequence[Microbatch], accepts: Callable[[Mapping[str, float]], bool] = accept_all
    ) -> StepResult:
        """Forward and backward over this data-parallel rank's microbatches, then one optimizer update.

        No weight and no optimizer state changes on any rank when a loss or a gradient of any rank is not finite, or
        when `accepts`, which is asked on all ranks, refuses the losses.
        """
        losses = self._accumulate(microbatches)
        metrics = losses.summarise()
        may_update = all(map(math.isfinite, metrics.values())) and accepts(metrics)
        return StepResult(metrics, optimizer_step(self.optimizer, may_update=may_update), losses.num_tokens)

    def find_nonfinite(self) -> tuple[bool, list[str]]:
        """After a step: whether this rank's own losses are not finite, and its weights whose gradients are not."""
        names = [
            name
            for piece in self.pieces
            for name, parameter in piece.named_parameters()
            if not parameter.main_grad.isfinite().all()
        ]
        return not bool(self._own_sums.isfinite().all()), names

    def accumulate_gradients(self, microbatches: Sequence[Microbatch]) -> dict[str, float]:
        """The step up to the update: `main_grad` of every weight holds the gradient of the global batch's objective."""
        return self._accumulate(microbatches).summarise()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Sequence[Microbatch]]) -> dict[str, float]:
        """Metrics over all batches together: summed terms over summed counts.

        Ends early when a rank wants to stop. Where a generator corrupts the input of a text-to-text objective
        (SPACTOR), its loss on the input as it was, "clean lm loss", stands beside the one on replaced tokens (the
        paper's figure 4).
        """
        for chunk in self.chunks:
            chunk.eval()
        losses, clean = [], []
        for microbatches in batches:
            losses.append(self._run(microbatches, forward_only=True))
            if self.is_told_to_stop:
                break
            if self.run.model.has_generator and target_kind(self.run.objective) == "others":
                clean.append(self._run([batch.without_masks() for batch in microbatches], forward_only=True))
        metrics = StepLosses.merge(losses).summarise()
        return metrics | {"clean lm loss": StepLosses.merge(clean).summarise()["lm loss"]} if clean else metrics

    def synchronise_parameters(self) -> None:
        """Finish gathering updated parameters, which the next forward pass would otherwise do (overlapped gather)."""
        if self.run.parallel.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def close(self) -> None:
        """Let go of process groups and of the hooks that tie the engine to megatron-core's configuration."""
        self.shared.close()
        for hook in ("grad_scale", "finalize_model_grads", "no_sync", "grad_sync", "param_sync"):
            setattr(self.core_config, f"{hook}_func", None)

    def _accumulate(self, microbatches: Sequence[Microbatch]) -> StepLosses:
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(microbatches, forward_only=False)

    def _run(self, microbatches: Sequence[Microbatch], *, forward_only: bool) -> StepLosses:
        """All microbatches through the schedule; the loss terms of all stages, summed over the world."""
        counts = all_reduce_sum(count_tokens(microbatches), self.groups.dp_group)
        losses = StepLosses(
            self.objective,
            counts,
            loss_scale=self.optimizer.get_loss_scale(),
            has_lm_head=self.run.model.has_lm_head,
        )
        for piece in self.pieces:
            piece.losses = losses
        shape = microbatches[0].shape
        with self._messages(shape, len(microbatches), forward_only):
            get_forward_backward_func()(
                forward_step_func=_forward_step,
                data_iterator=[self._hand_out(microbatches) for _ in self.chunks],
                model=self.chunks,
                num_microbatches=len(microbatches),
                seq_length=shape.encoder_length,  # not read: the communicator knows every shape
                micro_batch_size=shape.micro_batch_size,
                forward_only=forward_only,
                p2p_communicator=self.communicator,
                pg_collection=self.groups.collection,
            )
        self._own_sums = losses.sums.clone()
        # Tensor-parallel ranks hold the same sums, so one of them speaks.
        if self.groups.tp_rank != 0:
            losses.sums.zero_()
        if self.wants_stop():
            losses.vote_to_stop()
        all_reduce_sum(losses.sums, self.groups.world_group)
        self.is_told_to_stop = losses.is_voted_to_stop
        return losses

    def _hand_out(self, microbatches: Sequence[Microbatch]) -> Iterator[Microbatch]:
        for microbatch in microbatches:
            self.tick()
            yield microbatch

    def _messages(
        self, shape: MicrobatchShape, num_microbatches: int, forward_only: bool
    ) -> AbstractContextManager[None]:
        if self.communicator is None:
            return nullcontext()
        return self.communicator.step(num_microbatches, partial(self.message_shape, shape), forward_only=forward_only)

    def message_shape(self, shape: MicrobatchShape, piece: int) -> tuple[int, int, int]:
        """Rows, sequences and width of what a piece sends to the next one."""
        rows = payload_rows(
            self.layout.pieces[piece][-1],
            self.run.model,
            encoder_length=shape.encoder_length,
            decoder_length=shape.decoder_length,
            num_masked_slots=shape.num_masked_slots,
            sequence_shards=self.groups.tp_size if self.run.parallel.sequence_parallel else 1,
        )
        return rows.total, shape.micro_batch_size, rows.width

    def _connect_hooks(self) -> None:
        """Hand megatron-core's schedules what they call back, as Megatron's own training loop does."""
        config = self.core_config
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = self._finalize_gradients
        is_single = len(self.chunks) == 1
        if self.run.parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = no_sync[0] if is_single else no_sync
            if not is_single:
                config.grad_sync_func = [chunk.start_grad_sync for chunk in self.chunks]
        if self.run.parallel.overlap_param_gather and not is_single:
            config.param_sync_func = [chunk.start_param_sync for chunk in self.chunks]

    def _finalize_gradients(
        self,
        chunks: list[DistributedDataParallel],
        num_tokens: Tensor | None,
        pg_collection: ProcessGroupCollection | None = None,
        force_all_reduce: bool = False,
    ) -> None:
        """Core's reductions, then the copies of shared weights.

        Core is told of no tokens: it would divide by those of the last stage, after a broadcast, what the losses have
        divided where they stand.
        """
        core_finalize_model_grads(chunks, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
        self.shared.sum_gradients()


def _forward_step(
    microbatches: Iterator[Microbatch], chunk: DistributedDataParallel
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    """The one forward step handed to the schedules, for every layout and objective."""
    output: Tensor = chunk(next(microbatches))
    # The three that core expects: the loss, a token count that nothing reads, and nothing to report.
    return output, lambda loss: (loss, torch.zeros([], dtype=torch.int, device=loss.device), {})
