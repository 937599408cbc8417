"""Scheduled loss weights and masking rates in a run: what is trained at each step, what is logged, resuming."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_metro.device import Device
from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers.layouts import Row
from tests.helpers.markov import Curves, markov_run, train, write_source
from tests.helpers.parity import Arrays
from tests.helpers.pipeline import build_engine, microbatches_of, whole_gradients

RISE = {"rtd_loss_weight_schedule": "0:0,4:40"}
SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "metro": ("mask_prob", {**RISE, "mask_prob_schedule": "0:0.1,4:0.3"}),
    # Means, whose sum the test forms from the logged losses.
    "spactor": (
        "spactor_mask_prob",
        {
            **RISE,
            "objective": "spactor",
            "spactor_normalisation": "mean",
            "spactor_tau": None,
            "spactor_mask_prob_schedule": "0:0.1,4:0.3",
        },
    ),
}


def gradients_at(step: int, objective: dict[str, Any]) -> tuple[Arrays, dict[str, float]]:
    """Gradients and numbers of one batch with the weights of a step."""
    case = Row(objective=objective).case()
    engine = build_engine(case)
    engine.set_step(step)
    metrics = engine.accumulate_gradients(microbatches_of(engine, case))
    return whole_gradients(engine), metrics


@pytest.mark.parametrize("term", ["mlm", "rtd", "lm"])
def test_a_step_trains_with_the_weights_of_its_place(term: str, groups: ParallelGroups) -> None:
    gradients, metrics = gradients_at(15, {f"{term}_loss_weight_schedule": "10:3,20:5"})
    expected, expected_metrics = gradients_at(0, {f"{term}_loss_weight": 4.0})
    assert metrics == expected_metrics
    for name, gradient in expected.items():
        np.testing.assert_array_equal(gradients[name], gradient, err_msg=name)


def train_tiny(
    folder: Path, prefix: str, objective: dict[str, Any], device: Device, groups: ParallelGroups, **checkpoint: Any
) -> Curves:
    """Six steps of four short sequences, or what is left of them."""
    run = markov_run(prefix, folder, num_steps=6, batch_size=4, log_interval=1)
    model = replace(run.model, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2)
    training = replace(run.training, eval_iters=1, exit_interval=checkpoint.pop("exit_interval", None))
    run = replace(run, model=model, training=training, data=replace(run.data, encoder_seq_length=32))
    run = replace(
        run, objective=replace(run.objective, **objective), optimizer=replace(run.optimizer, lr_warmup_iters=1)
    )
    return train(replace(run, checkpoint=replace(run.checkpoint, **checkpoint)), device, groups)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_resumed_run_goes_on_at_its_place(kind: str, device: Device, groups: ParallelGroups, tmp_path: Path) -> None:
    rate, objective, prefix = SCHEDULES[kind][0], SCHEDULES[kind][1], write_source(tmp_path)
    whole = train_tiny(tmp_path / "whole", prefix, objective, device, groups)
    assert [line["rtd_loss_weight"] for line in whole.steps] == [0.0, 10.0, 20.0, 30.0, 40.0, 40.0]
    assert [line[rate] for line in whole.steps] == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3, 0.3])
    for line in whole.steps:
        total = line["lm_loss"] + line["mlm_loss"] + line["rtd_loss_weight"] * line["rtd_loss"]
        assert line["total_loss"] == pytest.approx(total)
    train_tiny(tmp_path / "first", prefix, objective, device, groups, exit_interval=2)
    rest = train_tiny(tmp_path / "rest", prefix, objective, device, groups, load=str(tmp_path / "first"))
    for found, expected in zip(rest.steps, whole.steps[2:], strict=True):
        for name in ("lm_loss", "mlm_loss", "total_loss", "grad_norm", rate):
            assert found[name] == expected[name], name
