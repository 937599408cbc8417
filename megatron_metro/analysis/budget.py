"""FLOPs of a run up to a step, and the steps that a budget of FLOPs allows: what runs of equal cost are made with."""

from dataclasses import replace

from megatron_metro.analysis.cost import main_model, step_flops
from megatron_metro.config.batches import full_batch_size
from megatron_metro.config.errors import ConfigError
from megatron_metro.config.objectives import find_switch
from megatron_metro.config.schema import RunConfig


def flops_until(run: RunConfig, step: float) -> float:
    """FLOPs of the first `step` steps of a resolved run, forward and backward, over all devices; validation is free.

    SPACTOR's steps after its switch cost what those of a plain T5 do. Raises ConfigError where steps differ otherwise.
    """
    first, second = _costs_of_stages(run)
    switch = find_switch(run)
    num_first = step if switch is None else min(step, switch)
    return num_first * first + (step - num_first) * second


def steps_within(run: RunConfig, flops: float) -> int:
    """The most steps of a resolved run that compute no more than `flops`; ConfigError as in `flops_until`."""
    first, second = _costs_of_stages(run)
    switch, num_steps = find_switch(run), int(flops / first)
    if switch is None or num_steps < switch:
        return num_steps
    return switch + int((flops - switch * first) / second)


def _costs_of_stages(run: RunConfig) -> tuple[float, float]:
    """FLOPs of a step before and after a switch of stages."""
    for flag, value in (
        ("--rampup-batch-size", run.training.rampup_batch_size),
        ("--mask-prob-schedule", run.objective.mask_prob_schedule),
    ):
        if value:
            raise ConfigError(f"{flag} changes the FLOPs of a step along the run; leave it out to count in FLOPs")
    batch_size = full_batch_size(run.training)
    return step_flops(run, batch_size), step_flops(replace(run, model=main_model(run.model)), batch_size)
