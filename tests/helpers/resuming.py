"""A run of the real engine that is saved in one layout and goes on in another."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_metro.config.schema import CheckpointConfig
from megatron_metro.training.loading import load_checkpoint
from megatron_metro.training.saving import save_checkpoint
from megatron_metro.training.state import TrainState
from tests.helpers.distributed import WorkerPool
from tests.helpers.layouts import Row
from tests.helpers.parity import GLOBAL_BATCH_SIZE, Arrays, Case, _gather, _parameters, worst_error, worst_metric_error
from tests.helpers.pipeline import build_engine, even_cut, microbatches_of

SAVED_STEP = 3
LAST_STEP = 5
NO_CHECKPOINT = CheckpointConfig()


@dataclass
class Stretch:
    """Some steps of a run, in whole tensors by parameter name."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    before: Arrays = field(default_factory=dict)
    weights: Arrays = field(default_factory=dict)


def make_case(row: Row) -> Case:
    """What the processes of a row run, with its cut of the chain written out."""
    case = row.case()
    if row.pp == 1:
        return case
    layout = case.layout or even_cut(case.run.model, row.pp * row.vpp)
    parallel = replace(case.run.parallel, pipeline_model_parallel_layout=layout)
    return replace(case, layout=layout, run=replace(case.run, parallel=parallel))


def train(case: Case, first: int, last: int, checkpoint: CheckpointConfig = NO_CHECKPOINT) -> Stretch | None:
    """Steps `first` to `last` of a run, from --load and saved to --save where given; rank 0 returns what they did."""
    case = replace(case, run=replace(case.run, checkpoint=checkpoint))
    engine, stretch = build_engine(case), Stretch()
    if checkpoint.load is not None:
        _spoil(engine.pieces)
        state = load_checkpoint(case.run, engine.chunks, engine.optimizer, engine.groups)
        assert state == TrainState(iteration=first, consumed_samples=first * GLOBAL_BATCH_SIZE)
    stretch.before = _gather(engine, {n: p.detach().double() for n, p in _parameters(engine).items()})
    for step in range(first, last):
        result = engine.train_step(microbatches_of(engine, case, step))
        stretch.metrics.append(result.metrics)
        stretch.norms.append(result.outcome.grad_norm)
    engine.synchronise_parameters()
    assert engine.shared.find_differing() == [], "copies of shared weights have come apart"
    if checkpoint.save is not None:
        state = TrainState(iteration=last, consumed_samples=last * GLOBAL_BATCH_SIZE)
        save_checkpoint(case.run, state, engine.chunks, engine.optimizer, engine.groups)
    stretch.weights = _gather(engine, {n: p.detach().double() for n, p in _parameters(engine).items()})
    return stretch if engine.groups.rank == 0 else None


@torch.no_grad()
def _spoil(pieces: list[torch.nn.Module]) -> None:
    """Put numbers into all weights that loading must replace; rows that pad the vocabulary are zero and stay so."""
    for piece in pieces:
        for parameter in piece.parameters():
            parameter.data.mul_(7.0)


def save_early(case: Case, folder: Path) -> None:
    """Train the first steps and save them; on all processes of a pool, or on this one alone."""
    train(case, 0, SAVED_STEP, CheckpointConfig(save=str(folder)))


def go_on(case: Case, folder: Path, *, forget_moments: bool = False) -> Stretch | None:
    """The last steps, from what any layout saved."""
    return train(case, SAVED_STEP, LAST_STEP, CheckpointConfig(load=str(folder), no_load_optim=forget_moments))


def run_on(pool: Callable[[int], WorkerPool], row: Row, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(case, *arguments)` on the processes of a row; the answer of rank 0. One process is this one."""
    if row.world_size == 1:
        return function(make_case(row), *arguments)
    return pool(row.world_size).run(function, make_case(row), *arguments)[0]


def check_continuation(found: Stretch, expected: Stretch, tolerance: float) -> float:
    """The last steps are those of an uninterrupted run; the worst error."""
    uninterrupted = expected.metrics[SAVED_STEP:], expected.norms[SAVED_STEP:]
    resumed = found.metrics, found.norms
    errors = {
        "logged numbers": worst_metric_error(resumed[0], uninterrupted[0]),
        "gradient norms": worst_metric_error(*([{"norm": x} for x in run[1]] for run in (resumed, uninterrupted))),
        "updates": worst_error(_updates(found, expected), _updates(expected, expected))[0],
    }
    missed = [f"{name} differ by {error:.0e}" for name, error in errors.items() if not error <= tolerance]
    assert not missed, ", ".join(missed)
    return max(errors.values())


def _updates(stretch: Stretch, whole_run: Stretch) -> Arrays:
    return {name: weight - whole_run.before[name] for name, weight in stretch.weights.items()}
