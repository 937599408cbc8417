"""The engine on one process against a restatement: every logged number and every gradient."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Protocol

import pytest
import torch
from torch import Tensor

from megatron_metro.batch import Microbatch
from megatron_metro.config.chain import build_chain
from megatron_metro.config.schema import ModelConfig, ObjectiveConfig
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.parallel.layout import StageLayout
from megatron_metro.training.engine import Engine
from tests.helpers import tiny
from tests.helpers.parity import perturb
from tests.helpers.reference import ReferenceMetro


class Restated(Protocol):
    """What a restatement gives: the objective with its graph, and numbers of the log."""

    total: Tensor
    log: dict[str, float]


def split(batch: Microbatch, size: int) -> list[Microbatch]:
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    starts = range(0, batch.encoder_tokens.shape[0], size)
    return [replace(batch, **{k: v[i : i + size] for k, v in values.items() if v is not None}) for i in starts]


def make_engine(groups: ParallelGroups, model: ModelConfig, objective: ObjectiveConfig) -> Engine:
    run = tiny.tiny_run(model, objective=objective)
    layout = StageLayout(pieces=(build_chain(model),), pp_size=1, vpp_size=1)
    engine = Engine(run, layout, groups, torch.float64, pad_id=tiny.PAD_ID)
    perturb(engine)
    return engine


def check(engine: Engine, microbatches: list[Microbatch], objective: ObjectiveConfig) -> None:
    """Against the plain-PyTorch METRO."""

    def restate(leaves: Mapping[str, Tensor]) -> Restated:
        return ReferenceMetro(leaves, engine.run.model, pad_id=tiny.PAD_ID).run(microbatches, objective)

    compare(engine, microbatches, restate)


def compare(
    engine: Engine, microbatches: list[Microbatch], restate: Callable[[Mapping[str, Tensor]], Restated]
) -> dict[str, float]:
    """Numbers to 1e-11 and gradients to 1e-10; returns the engine's log."""
    log = engine.accumulate_gradients(microbatches)
    parameters = dict(engine.pieces[0].named_parameters())
    leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    expected = restate(leaves)
    expected.total.backward()
    for name, value in expected.log.items():
        assert log[name] == pytest.approx(value, rel=1e-11, abs=1e-11), name
    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    floor = 1e-3 * max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        found = parameters[name].main_grad.double()
        error = float((found - gradient).abs().max()) / max(float(gradient.abs().max()), floor)
        assert error <= 1e-10, f"{name}: {error:.1e}"
    return log
