"""Learning rates: golden values of the reference, agreement with Megatron-Core, T5's constant warm-up."""

import math
from types import SimpleNamespace

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_metro.config.schema import OptimizerConfig
from megatron_metro.training.schedule import learning_rate

BASE = OptimizerConfig(lr=4e-4, lr_warmup_iters=10_000)  # metro base: 125,000 updates


@pytest.mark.parametrize(
    ("num_updates", "expected"),
    [(0, 0.0), (1, 4e-8), (5_000, 2e-4), (10_000, 4e-4), (67_500, 2e-4), (124_999, 4e-4 / 115_000), (125_000, 0.0)],
)
def test_metro_base(num_updates, expected):
    assert learning_rate(BASE, num_updates, 125_000) == pytest.approx(expected, rel=1e-10, abs=1e-20)


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_agrees_with_megatron_core(style, warmup):
    config = OptimizerConfig(
        lr=3e-3, min_lr=1e-4, lr_decay_style=style, lr_warmup_iters=warmup, lr_decay_iters=40, weight_decay=0.01
    )
    group = {"lr": None}
    core = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=40,
        lr_decay_style=style,
        start_wd=0.01,
        end_wd=0.01,
        wd_incr_steps=40,
        wd_incr_style="constant",
    )
    for num_updates in range(50):
        if (style, warmup, num_updates) != ("inverse-square-root", 0, 0):
            assert learning_rate(config, num_updates, 1_000) == pytest.approx(group["lr"], rel=1e-12)
        core.step(1)


def test_t5_holds_its_rate_during_the_warmup():
    config = OptimizerConfig(
        lr=0.01, lr_decay_style="inverse-square-root", lr_warmup_style="constant", lr_warmup_iters=10_000
    )
    for num_updates in (0, 1, 10_000, 40_000, 1_000_000):
        expected = 1.0 / math.sqrt(max(num_updates, 10_000))
        assert learning_rate(config, num_updates, 2_000_000) == pytest.approx(expected, rel=1e-12)


def test_a_run_shorter_than_its_warmup():
    assert learning_rate(BASE, 100, 200) == pytest.approx(4e-6)
    assert learning_rate(BASE, 10_001, 200) == 0.0
