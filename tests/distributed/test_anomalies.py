"""A loss or gradient that is not finite, wherever it arises: all ranks skip that step, and not a bit of state moves."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from megatron_metro.config.schema import ParallelConfig
from megatron_metro.model.transformer_config import parameter_dtype
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.parity import Case

SHARDED = {"use_distributed_optimizer": True}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
BF16, FP16 = {"bf16": True}, {"fp16": True, "initial_loss_scale": 16.0}
ADAFACTOR = {"optimizer": "adafactor"}
BAD_STEP = 2


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A number put into one rank's loss, or into its gradient of the first weight whose name has a text in it."""

    rank: int = 1
    weight: str | None = None  # None: the LM loss of the rank's first microbatch
    value: float = math.nan
    is_reduced: bool = False  # after the ranks have summed their gradients: the others do not see it


def make_case(parallel: dict[str, Any], optimizer: dict[str, Any]) -> Case:
    run = tiny.tiny_run(parallel=ParallelConfig(**parallel), **optimizer)
    layout = "GggM|eeRDddL" if "pipeline_model_parallel_size" in parallel else None
    return Case(run=run, dtype=parameter_dtype(run.optimizer), layout=layout)


@contextmanager
def broken(engine: Any, fault: Fault) -> Iterator[None]:
    """The fault, on its rank, in every step."""
    from megatron_metro.losses.step import StepLosses
    from tests.helpers.mutations import replaced_attribute

    if engine.groups.rank != fault.rank:
        yield
        return
    if fault.weight is None:
        add_lm = StepLosses.add_lm
        with replaced_attribute(StepLosses, "add_lm", lambda self, nll, *rest: add_lm(self, nll * fault.value, *rest)):
            yield
        return
    weights = {name: weight for piece in engine.pieces for name, weight in piece.named_parameters()}
    weight = next(weight for name, weight in weights.items() if fault.weight in name)
    finalize = engine.core_config.finalize_model_grads_func

    def finalize_broken(*arguments: Any, **options: Any) -> None:
        if fault.is_reduced:
            finalize(*arguments, **options)
        weight.main_grad.view(-1)[0] = fault.value
        if not fault.is_reduced:
            finalize(*arguments, **options)

    with replaced_attribute(engine.core_config, "finalize_model_grads_func", finalize_broken):
        yield


def meet(case: Case, fault: Fault) -> tuple[list[bool], bool, tuple[bool, list[str]], bool]:
    """Which steps changed weights; whether the bad one left every bit; what was found; whether its result is finite."""
    from tests.helpers.pipeline import build_engine, microbatches_of, state_bytes

    engine = build_engine(case)
    updated = []
    for step in range(5):
        if step != BAD_STEP:
            updated.append(engine.train_step(microbatches_of(engine, case, step)).outcome.updated)
            continue
        before = state_bytes(engine)
        with broken(engine, fault):
            result = engine.train_step(microbatches_of(engine, case, step))
        findings = engine.find_nonfinite()
        updated.append(result.outcome.updated)
        engine.synchronise_parameters()
        is_unchanged = state_bytes(engine) == before
    return updated, is_unchanged, findings, result.is_finite


CASES = {
    "loss dp": (make_case({}, {}), Fault()),
    "loss dp of the first rank": (make_case({}, {}), Fault(rank=0, value=math.inf)),
    "loss bf16 sharded": (make_case(SHARDED, BF16), Fault(value=-math.inf)),
    "loss fp16": (make_case({}, FP16), Fault()),
    "loss pp": (make_case(PP2, {}), Fault()),
    "gradient dp bf16": (make_case({}, BF16), Fault(weight="encoder.layers.0")),
    "gradient fp16 sharded": (make_case(SHARDED, FP16), Fault(weight="decoder.layers.1", value=math.inf)),
    "gradient adafactor": (make_case({}, ADAFACTOR), Fault(weight="generator.layers.1", value=-math.inf)),
    "gradient adafactor tp bf16": (make_case(TP2, ADAFACTOR | BF16), Fault(weight="decoder.layers.0")),
    "shared embedding pp": (make_case(PP2, {}), Fault(weight="word_embeddings", value=math.inf)),
    "generator alone pp bf16": (make_case(PP2, BF16), Fault(rank=0, weight="generator.layers.0")),
    # On one rank only, and in a weight that the norm does not count there.
    "replicated weight tp": (make_case(TP2, {}), Fault(weight="norm", is_reduced=True)),
    "replicated weight tp bf16": (make_case(TP2, BF16), Fault(weight="norm", value=math.inf, is_reduced=True)),
    "one replica dp": (make_case({}, {}), Fault(weight="encoder.layers.1", is_reduced=True)),
    "overflowing sum sharded": (make_case(SHARDED, {}), Fault(weight="mlm_head", value=3e38)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_step_changes_nothing_on_any_rank(name: str, pool: Callable[[int], WorkerPool]) -> None:
    case, fault = CASES[name]
    answers = pool(2).run(meet, case, fault)
    for updated, is_unchanged, _, is_finite in answers:
        # Every other step counts: what was bad once leaves nothing behind.
        assert updated == [step != BAD_STEP for step in range(5)]
        assert is_unchanged and not is_finite
    _, _, (is_loss_broken, weights), _ = answers[fault.rank]
    if fault.weight is None:
        assert [found[0] for _, _, found, _ in answers] == [rank == fault.rank for rank in range(2)]
    elif math.isfinite(fault.value):
        assert not is_loss_broken and weights == []  # each number is finite, their norm is not
    else:
        assert not is_loss_broken and any(fault.weight in weight for weight in weights)
