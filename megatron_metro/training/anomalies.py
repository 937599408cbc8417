"""Steps that are not as others: losses or gradients that are not finite, and losses that jump.

What is found is the same on all ranks, since every rank looks at the same reduced numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from megatron_metro.config.errors import NumericError
from megatron_metro.config.schema import RunConfig
from megatron_metro.parallel.agreement import gather_on_all
from megatron_metro.training.engine import Engine, StepResult
from megatron_metro.training.reporting import Reporter
from megatron_metro.training.state import TrainState

WINDOW_STEPS = 128
LEAST_STEPS = 32  # fewer losses say nothing about what is usual
# The median of absolute deviations times this is the standard deviation of a normal distribution.
_DEVIATION_PER_MAD = 1.4826
# Losses that hardly move have a spread next to 0, by which any change would be many deviations.
_LEAST_SPREAD = 0.01
_SHOWN_WEIGHTS = 3


def spike_limit(recent: Sequence[float], deviations: float) -> float:
    """The loss above which a step is a spike: so many standard deviations above the usual one; inf at first.

    Median and median absolute deviation: up to half of the losses may be spikes without moving the limit far.
    """
    if len(recent) < LEAST_STEPS:
        return math.inf
    usual = median(recent)
    spread = _DEVIATION_PER_MAD * median(abs(loss - usual) for loss in recent)
    return usual + deviations * max(spread, _LEAST_SPREAD * abs(usual))


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSamples:
    """A step and the training sequences it read: `first` up to, not including, `end`, in the order of the run."""

    iteration: int
    first: int
    end: int


class AnomalyGuard:
    """Judges each step of a run, records what is unusual and ends the run when it does not pass."""

    def __init__(self, run: RunConfig, engine: Engine, reporter: Reporter) -> None:
        self._engine, self._reporter = engine, reporter
        self._training, self._optimizer = run.training, run.optimizer
        self._recent: Sequence[float] = ()
        self._num_updates = 0

    def step(self, state: TrainState, microbatches: Sequence[Any], num_samples: int) -> tuple[StepResult, TrainState]:
        """One step of the engine on `num_samples` sequences, and where the run then is. Raises NumericError."""
        self._recent = state.recent_losses
        result = self._engine.train_step(microbatches, self._accepts)
        samples = StepSamples(
            iteration=state.iteration + 1, first=state.consumed_samples, end=state.consumed_samples + num_samples
        )
        self._num_updates += result.outcome.updated
        is_broken = not result.is_finite and not self._is_cured_by_scaling(result)
        in_a_row = state.nonfinite_in_a_row + 1 if is_broken else 0
        if is_broken:
            self._record_broken(result, samples, in_a_row)
        elif self._is_spike(result.metrics) and not self._is_spike_again():
            self._record_spike(result, samples)
        loss = result.metrics["total loss"]
        recent = (*self._recent, loss)[-WINDOW_STEPS:] if math.isfinite(loss) else self._recent
        state = replace(
            state,
            iteration=samples.iteration,
            skipped_iterations=state.skipped_iterations + (not result.outcome.updated),
            consumed_samples=samples.end,
            consumed_tokens=state.consumed_tokens + result.num_tokens,
            nonfinite_in_a_row=in_a_row,
            recent_losses=tuple(recent),
        )
        self._stop_when_hopeless(state)
        return result, state

    def check_end(self, state: TrainState) -> None:
        """Raise NumericError at the end of a run that has not changed a weight because nothing was finite."""
        if state.nonfinite_in_a_row and not self._num_updates:
            raise NumericError(
                f"iteration {state.iteration}: no step of this run had finite losses and gradients, so no weight has "
                "changed and nothing is saved; lower --lr, or look at anomalies.jsonl in --save"
            )

    def _accepts(self, metrics: Mapping[str, float]) -> bool:
        return self._training.loss_spike_policy == "report" or not self._is_spike(metrics)

    def _is_spike(self, metrics: Mapping[str, float]) -> bool:
        return metrics["total loss"] > spike_limit(self._recent, self._training.loss_spike_deviations)

    def _is_spike_again(self) -> bool:
        return self._recent[-1] > spike_limit(self._recent[:-1], self._training.loss_spike_deviations)

    def _is_cured_by_scaling(self, result: StepResult) -> bool:
        """Whether FP16's dynamic loss scale was too large, as it is again and again, and can still fall."""
        is_dynamic = self._optimizer.fp16 and self._optimizer.loss_scale is None
        has_finite_loss = all(map(math.isfinite, result.metrics.values()))
        return is_dynamic and has_finite_loss and result.outcome.loss_scale > self._optimizer.min_loss_scale

    def _record_broken(self, result: StepResult, samples: StepSamples, in_a_row: int) -> None:
        findings = gather_on_all(self._engine.find_nonfinite())
        of_loss = [rank for rank, (is_broken, _) in enumerate(findings) if is_broken]
        weights = sorted({name for _, names in findings for name in names})
        what = f"a loss that is not finite on rank {' and '.join(map(str, of_loss))}" if of_loss else ""
        if weights:
            more = f" and {len(weights) - _SHOWN_WEIGHTS} more" if len(weights) > _SHOWN_WEIGHTS else ""
            of_weights = f"gradients that are not finite of {', '.join(weights[:_SHOWN_WEIGHTS])}{more}"
            what = f"{what} and {of_weights}" if what else of_weights
        self._reporter.anomaly(
            f"WARNING: iteration {samples.iteration} had {what or 'a gradient norm that overflows'}: samples "
            f"{samples.first} to {samples.end - 1} changed no weight ({in_a_row} in a row, the run stops at "
            f"--max-nonfinite-steps {self._training.max_nonfinite_steps})",
            {
                **self._describe("nonfinite", result, samples),
                "loss_ranks": of_loss,
                "gradient_ranks": [rank for rank, (_, names) in enumerate(findings) if names],
                "weights": weights,
                "in_a_row": in_a_row,
            },
        )

    def _record_spike(self, result: StepResult, samples: StepSamples) -> None:
        limit = spike_limit(self._recent, self._training.loss_spike_deviations)
        effect = "counted" if result.outcome.updated else "changed no weight"
        self._reporter.anomaly(
            f"WARNING: iteration {samples.iteration} has total loss {result.metrics['total loss']:.4f} where up to "
            f"{limit:.4f} is usual; its samples {samples.first} to {samples.end - 1} {effect} (--loss-spike-policy "
            f"{self._training.loss_spike_policy})",
            {**self._describe("loss spike", result, samples), "limit": limit, "updated": result.outcome.updated},
        )

    @staticmethod
    def _describe(kind: str, result: StepResult, samples: StepSamples) -> dict[str, Any]:
        return {
            "iteration": samples.iteration,
            "kind": kind,
            "first_sample": samples.first,
            "last_sample": samples.end - 1,
            **result.metrics,
            "grad_norm": result.outcome.grad_norm,
            "loss_scale": result.outcome.loss_scale,
        }

    def _stop_when_hopeless(self, state: TrainState) -> None:
        limit = self._training.max_nonfinite_steps
        if state.nonfinite_in_a_row < limit:
            return
        scale = f" at --min-loss-scale {self._optimizer.min_loss_scale:g}" if self._optimizer.fp16 else ""
        raise NumericError(
            f"--max-nonfinite-steps {limit}: iteration {state.iteration} is number {state.nonfinite_in_a_row} in a row "
            f"with losses or gradients that are not finite{scale}; no weight has changed meanwhile and nothing is "
            "saved; go on from the last checkpoint with a lower --lr, with --clip-grad or in --bf16"
        )
