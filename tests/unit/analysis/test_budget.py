"""Steps of equal cost."""

from dataclasses import replace

import pytest

from megatron_metro.analysis.budget import flops_until, steps_within
from megatron_metro.analysis.cost import main_model, step_flops
from megatron_metro.config.errors import ConfigError
from megatron_metro.config.fields import change_values
from megatron_metro.config.presets import metro_tiny
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.terms import follow_objective

VARIANTS = {
    "metro": {},
    "t5": {"objective": "t5-span"},
    "spactor alone": {"objective": "spactor", "spactor_tau": None},
    "spactor": {"objective": "spactor", "spactor_tau": 30},
}


def make_run(**changes) -> RunConfig:
    run = change_values(metro_tiny(), {"vocab_size": 640, **changes})
    return follow_objective(run, metro_tiny(), changes)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("share", [0.3, 1.0, 7.7])
def test_a_budget_is_used_up_to_less_than_a_step(name, share):
    budget = share * 50 * step_flops(make_run(), 16)
    run = make_run(**VARIANTS[name])
    num_steps = steps_within(run, budget)
    assert flops_until(run, num_steps) <= budget < flops_until(run, num_steps + 1)


def test_steps_after_the_switch_are_those_of_a_plain_t5():
    spactor, alone, t5 = (make_run(**VARIANTS[name]) for name in ("spactor", "spactor alone", "t5"))
    assert flops_until(spactor, 30) == flops_until(alone, 30)
    assert flops_until(spactor, 50) - flops_until(spactor, 30) == pytest.approx(flops_until(t5, 20), rel=1e-12)
    assert main_model(spactor.model) == t5.model
    # Up to the switch a step more costs what a generator costs; a budget that ends there stays there.
    assert steps_within(spactor, flops_until(alone, 30)) == 30
    assert steps_within(spactor, flops_until(alone, 29.9)) == 29
    assert flops_until(spactor, 0) == 0


@pytest.mark.parametrize(
    ("flag", "run"),
    [
        ("--mask-prob-schedule", make_run(mask_prob_schedule="0:0.1,100:0.2")),
        (
            "--rampup-batch-size",
            replace(make_run(), training=replace(make_run().training, rampup_batch_size=(4, 4, 100))),
        ),
    ],
)
def test_steps_of_different_cost_are_refused(flag, run):
    with pytest.raises(ConfigError, match=f"^{flag} changes the FLOPs"):
        steps_within(run, 1e12)
