"""Adafactor in FP16 with a dynamic loss scale, and in any layout with T5's own epsilon.

A gradient that is zero in theory is rounding noise, which Adafactor divides by its own size: with the default epsilon
the key biases of a METRO (a constant added to all scores of a query changes nothing) get updates of full size that
differ between any two layouts, by 1.7 of themselves in FP32 and, since float64's noise is below the epsilon, by 1e-4
there. All other weights agree, and so does a T5, which has no biases: the larger epsilon of other tests hides nothing.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from megatron_metro.config.schema import ModelConfig
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.training.engine import Engine
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.layouts import Row
from tests.helpers.parity import Arrays, Case, run_case, worst_error, worst_metric_error
from tests.helpers.pipeline import build_engine, microbatches_of

Pool = Callable[[int], WorkerPool]

NUM_STEPS = 24
FP16 = {"optimizer": "adafactor", "lr": 3e-2, "fp16": True, "initial_loss_scale": 2.0**24, "loss_scale_window": 3}


class Step(NamedTuple):
    """What one step did; the same on every rank."""

    updated: bool
    loss_scale: float
    loss: float
    has_state: bool  # before the step


def copy_everything(engine: Engine) -> dict[str, torch.Tensor]:
    """FP16 weights, FP32 main weights, Adafactor's statistics and its count of steps, on this rank."""
    adafactor = engine.optimizer.optimizer
    parameters = [parameter for piece in engine.pieces for parameter in piece.parameters()]
    found = {f"weight {i}": parameter.detach().clone() for i, parameter in enumerate(parameters)}
    for i, main in enumerate(engine.optimizer.get_parameters()):
        found[f"main {i}"] = main.detach().clone()
        found |= {f"{name} {i}": value.clone() for name, value in adafactor.state[main].items()}
    return found | {"step": torch.tensor(adafactor.param_groups[0]["step"])}


def train_in_fp16(case: Case) -> list[Step]:
    """Steps on one batch; asserts that one whose gradient overflows changes nothing."""
    engine, steps = build_engine(case), []
    for _ in range(NUM_STEPS):
        before = copy_everything(engine)
        result = engine.train_step(microbatches_of(engine, case))
        after = copy_everything(engine)
        updated, loss_scale = result.outcome.updated, result.outcome.loss_scale
        if not updated:
            assert all(torch.equal(after[name], value) for name, value in before.items())
            assert after.keys() == before.keys() or not int(before["step"])  # statistics may be zeroed before the first
        else:
            assert int(after["step"]) == int(before["step"]) + 1
        steps.append(Step(updated, loss_scale, result.metrics["total loss"], bool(int(before["step"]))))
    return steps


@pytest.mark.parametrize(
    "row",
    [
        Row(dp=2),
        Row(tp=2, sp=True, spans=True, model=tiny.T5_V1_1, model_name="T5 v1.1"),
    ],
    ids=["dp2", "tp2sp T5"],
)
def test_fp16_with_a_dynamic_loss_scale(row: Row, pool: Pool) -> None:
    case = replace(replace(row, optimizer=FP16).case(), dtype=torch.float16)
    first, second = pool(2).run(train_in_fp16, case)
    assert first == second
    scales = [step.loss_scale for step in first]
    assert not first[0].updated and scales[0] == 2.0**24  # overflows at once, and the scale falls until it fits
    assert any(step.updated for step in first)
    assert any(not step.updated and step.has_state for step in first)  # it grows again until it overflows
    assert all(a / b in (0.5, 1.0, 2.0) for a, b in zip(scales[1:], scales))
    trained = [step.loss for step in first if step.updated]
    assert trained[-1] < 0.9 * trained[0]


DEFAULT = {"optimizer": "adafactor", "lr": 1e-2}  # T5's rate and epsilons
PLACES = (Row(tp=2, sp=True), Row(pp=2, vpp=2), Row(dp=2))


@pytest.mark.parametrize("single", [False, True], ids=["float64", "fp32"])
@pytest.mark.parametrize("place", PLACES, ids=lambda row: row.name)
def test_t5_is_the_same_everywhere_with_its_own_epsilon(
    place: Row, single: bool, pool: Pool, groups: ParallelGroups
) -> None:
    model = {**tiny.T5_V1_1, "kv_channels": 6}
    row = replace(place, spans=True, model=model, single_precision=single, optimizer=DEFAULT, num_steps=3)
    expected, found = run_case(row.reference()), pool(2).run(run_case, row.case())[0]
    assert expected is not None
    assert worst_metric_error(found.metrics, expected.metrics) <= row.tolerance
    assert worst_error(found.updates, expected.updates)[0] <= row.tolerance


def split_key_biases(updates: Arrays, model: ModelConfig) -> tuple[Arrays, Arrays]:
    """(biases of keys, everything else); a fused bias has its parts by head, the keys' next to last."""
    keys, others = {}, dict(updates)
    for name in updates:
        if name.endswith(("linear_qkv.bias", "linear_kv.bias")):
            parts = updates[name].reshape(model.num_attention_heads, -1, model.head_size)
            keys[name], others[name] = parts[:, -2], parts[:, [*range(parts.shape[1] - 2), -1]]
    return keys, others


@pytest.mark.parametrize("place", [PLACES[0], PLACES[2]], ids=lambda row: row.name)
def test_metro_differs_in_nothing_but_key_biases(place: Row, pool: Pool, groups: ParallelGroups) -> None:
    row = replace(place, optimizer=DEFAULT, num_steps=3)
    expected, found = run_case(row.reference()), pool(2).run(run_case, row.case())[0]
    assert expected is not None
    worst = [
        worst_error(*pair)[0]
        for pair in zip(*(split_key_biases(o.updates, row.case().run.model) for o in (found, expected)), strict=True)
    ]
    assert worst[1] <= row.tolerance < worst[0]
    noise, gradients = split_key_biases(expected.gradients, row.case().run.model)
    assert max(abs(g).max() for g in noise.values()) < 1e-13 * max(abs(g).max() for g in gradients.values())
