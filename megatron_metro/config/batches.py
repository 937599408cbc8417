"""Sizes of the global batch along a run and the number of its steps: pure arithmetic on resolved settings."""

from bisect import bisect_left
from dataclasses import replace
from functools import partial

from megatron_metro.config.schema import TrainingConfig


def full_batch_size(training: TrainingConfig) -> int:
    """Sequences per step once any ramp-up is over."""
    assert training.global_batch_size is not None, "the configuration is not resolved"
    return training.global_batch_size


def list_batch_sizes(training: TrainingConfig) -> tuple[int, ...]:
    """Every global batch size of the run, smallest first; one size without ramp-up."""
    full = full_batch_size(training)
    if not training.rampup_batch_size:
        return (full,)
    start, increment, _ = training.rampup_batch_size
    return (*range(start, full, increment), full)


def batch_size_at(training: TrainingConfig, consumed_samples: int) -> int:
    """Sequences of the step that follows `consumed_samples`, as megatron-core's microbatch calculator counts them."""
    if not training.rampup_batch_size or consumed_samples > training.rampup_batch_size[2]:
        return full_batch_size(training)
    start, increment, rampup_samples = training.rampup_batch_size
    samples_per_size = rampup_samples / ((full_batch_size(training) - start) // increment)
    return start + int(consumed_samples / samples_per_size) * increment


def count_steps(training: TrainingConfig) -> int | None:
    """Optimizer steps of the run, from --train-iters or --train-samples; None when neither is given.

    A step that would pass --train-samples is not taken.
    """
    if training.train_iters is not None or training.train_samples is None:
        return training.train_iters
    num_steps, consumed_samples = 0, 0
    for size in list_batch_sizes(training):
        remaining = (training.train_samples - consumed_samples) // size
        taken = min(remaining, _count_steps_of(training, size, consumed_samples))
        num_steps += taken
        consumed_samples += taken * size
    return num_steps


def count_completed_steps(training: TrainingConfig, consumed_samples: int) -> int:
    """Steps that have taken so many samples from the start of the run on."""
    num_steps = count_steps(replace(training, train_iters=None, train_samples=consumed_samples))
    assert num_steps is not None
    return num_steps


def _count_steps_of(training: TrainingConfig, size: int, consumed_samples: int) -> int:
    """Steps from `consumed_samples` on whose batch is no larger than `size`; unbounded for the full size."""
    if size == full_batch_size(training):
        return 10**18
    is_larger = partial(_is_larger, training, size, consumed_samples)
    # The ramp ends at a known sample, so the first larger batch lies in this range.
    return bisect_left(range(training.rampup_batch_size[2] // size + 2), True, key=is_larger)


def _is_larger(training: TrainingConfig, size: int, consumed_samples: int, num_steps: int) -> bool:
    return batch_size_at(training, consumed_samples + num_steps * size) > size
