"""Adafactor in FP16 with a dynamic loss scale: it trains, and a step that overflows leaves no trace."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from megatron_metro.training.engine import Engine
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.layouts import Row
from tests.helpers.parity import Case
from tests.helpers.pipeline import build_engine, even_cut, microbatches_of

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
        Row(pp=2, layout=even_cut(tiny.tiny_model(), 2)),
    ],
    ids=["dp2", "tp2sp T5", "pp2"],
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
