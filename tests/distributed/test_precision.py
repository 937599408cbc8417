"""FP16 and BF16 in a pipeline: injected losses are scaled, an overflow stops all ranks, validation leaves no trace."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_metro.config.schema import ObjectiveConfig, ParallelConfig
from megatron_metro.model.transformer_config import parameter_dtype
from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.parity import Arrays, Case, worst_error

Pool = Callable[[int], WorkerPool]

PP2_DP2 = ParallelConfig(pipeline_model_parallel_size=2)
PP2_DP2_SHARDED = replace(PP2_DP2, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
PP2X2_DP2_SHARDED = replace(PP2_DP2_SHARDED, num_virtual_stages_per_pipeline_rank=2)
PP2_TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2)
PP4X2 = ParallelConfig(pipeline_model_parallel_size=4, num_virtual_stages_per_pipeline_rank=2)
LAYOUTS = {1: None, 2: "GggM|eeRDddL", 4: "Gg|gMe|eRDd|dL", 8: "G|g|gM|e|e|RD|d|dL"}
# Relative errors of gradients in Frobenius norms: of the worst tensor and of all together. In a model this small a ReLU
# that rounding switches moves a tensor by a tenth; a loss with a wrong scale moves those of its network by its factor.
TOLERANCES = {torch.float16: (0.3, 0.01), torch.bfloat16: (0.5, 0.05)}


def make_case(parallel: ParallelConfig, objective: ObjectiveConfig | None = None, **optimizer: Any) -> Case:
    run = tiny.tiny_run(parallel=parallel, objective=objective, **optimizer)
    num_pieces = parallel.pipeline_model_parallel_size * parallel.num_virtual_stages_per_pipeline_rank
    size = 3 if num_pieces == 8 else 1
    return Case(run=run, micro_batch_size=size, dtype=parameter_dtype(run.optimizer), layout=LAYOUTS[num_pieces])


def cases(*chosen: Case) -> pytest.MarkDecorator:
    """Parametrise a test by cases under short names."""
    return pytest.mark.parametrize("case", chosen, ids=[name_of(case) for case in chosen])


def name_of(case: Case) -> str:
    parallel = case.run.parallel
    pipeline = f"pp{parallel.pipeline_model_parallel_size}x{parallel.num_virtual_stages_per_pipeline_rank}"
    traits = ["dist-opt"] * parallel.use_distributed_optimizer + [f"tp{parallel.tensor_model_parallel_size}"]
    return "-".join([str(case.dtype).removeprefix("torch."), pipeline, *traits])


def find_gradients(case: Case) -> tuple[Arrays, dict[str, float], float]:
    """Whole gradients and metrics of one step, and the norm of the gradients that the update saw."""
    from tests.helpers.pipeline import build_engine, fixed_fills, microbatches_of, whole_gradients

    engine = build_engine(case)
    with fixed_fills():
        microbatches = microbatches_of(engine, case)
        metrics = engine.accumulate_gradients(microbatches)
        gradients = whole_gradients(engine)
        norm = engine.train_step(microbatches).outcome.grad_norm
    return gradients, metrics, norm


def relative_errors(found: Arrays, expected: Arrays) -> tuple[float, float]:
    """Of the worst tensor (small ones by a hundredth of the largest), and of all tensors together."""
    assert found.keys() == expected.keys()
    errors = {name: float(np.linalg.norm(found[name] - array)) for name, array in expected.items()}
    sizes = {name: float(np.linalg.norm(array)) for name, array in expected.items()}
    floor = 1e-2 * max(sizes.values())
    return max(errors[name] / max(sizes[name], floor) for name in errors), math.hypot(*errors.values()) / math.hypot(
        *sizes.values()
    )


@pytest.fixture(scope="module")
def fp32() -> list[tuple[Arrays, dict[str, float], float]]:
    """The one-process FP32 step, computed when first needed."""
    return []


@cases(
    make_case(PP2_DP2, fp16=True, loss_scale=256.0),
    make_case(PP2X2_DP2_SHARDED, fp16=True, loss_scale=256.0),
    make_case(PP2_TP2, fp16=True, loss_scale=64.0),
    make_case(PP2X2_DP2_SHARDED, bf16=True),
    make_case(PP2_TP2, bf16=True),
)
def test_gradients_are_those_of_fp32(
    case: Case, pool: Pool, groups: ParallelGroups, fp32: list[tuple[Arrays, dict[str, float], float]]
) -> None:
    if not fp32:
        fp32.append(find_gradients(make_case(ParallelConfig())))
    expected, expected_metrics, expected_norm = fp32[0]
    gradients, metrics, norm = pool(4).run(find_gradients, case)[0]
    worst_tolerance, tolerance = TOLERANCES[case.dtype]
    worst, whole = relative_errors(gradients, expected)
    assert worst <= worst_tolerance and whole <= tolerance
    assert norm == pytest.approx(expected_norm, rel=tolerance)
    for name in ("mlm loss", "rtd loss", "lm loss"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=tolerance)


@cases(make_case(PP2_DP2, fp16=True, loss_scale=16.0), make_case(PP2X2_DP2_SHARDED, fp16=True, loss_scale=16.0))
def test_gradients_do_not_depend_on_the_loss_scale(case: Case, pool: Pool) -> None:
    """Powers of two within FP16's range change exponents only; what is left is the end of its denormals."""
    larger = replace(case, run=replace(case.run, optimizer=replace(case.run.optimizer, loss_scale=256.0)))
    found, expected = (pool(4).run(find_gradients, each)[0][0] for each in (case, larger))
    assert worst_error(found, expected)[0] <= 1e-3


@dataclass(frozen=True, kw_only=True)
class Overflow:
    """What a step with gradients beyond the range did on one rank."""

    updated: bool
    is_unchanged: bool  # every bit of weights, main weights and Adam's moments


def overflow(case: Case) -> Overflow:
    from tests.helpers.pipeline import build_engine, microbatches_of, state_bytes

    engine = build_engine(case)
    before = state_bytes(engine)
    outcome = engine.train_step(microbatches_of(engine, case)).outcome
    engine.synchronise_parameters()
    return Overflow(updated=outcome.updated, is_unchanged=state_bytes(engine) == before)


# The generator alone overflows, on the first stage: the last one must hear of it. Its weight in FP16 would be beyond
# FP32, so there the loss scale is what is too large.
TOO_LARGE = ObjectiveConfig(mlm_loss_weight=3e38)


@cases(
    make_case(PP2_DP2, fp16=True, loss_scale=2.0**40),
    make_case(PP4X2, fp16=True, loss_scale=2.0**40),
    make_case(PP2X2_DP2_SHARDED, TOO_LARGE, bf16=True),
    make_case(PP4X2, TOO_LARGE),
)
def test_an_overflow_changes_nothing_on_any_rank(case: Case, pool: Pool) -> None:
    for result in pool(4).run(overflow, case):
        assert not result.updated and result.is_unchanged


def lower_the_scale(case: Case) -> list[tuple[bool, float]]:
    """Steps until one updates: whether it did, and its loss scale."""
    from tests.helpers.pipeline import build_engine, microbatches_of

    engine = build_engine(case)
    steps: list[tuple[bool, float]] = []
    while len(steps) < 40 and not (steps and steps[-1][0]):
        outcome = engine.train_step(microbatches_of(engine, case)).outcome
        steps.append((outcome.updated, outcome.loss_scale))
    return steps


def test_the_dynamic_scale_falls_alike_until_a_step_fits(pool: Pool) -> None:
    case = replace(make_case(PP2X2_DP2_SHARDED, fp16=True, initial_loss_scale=2.0**16), micro_batch_size=3)
    first, *others = pool(4).run(lower_the_scale, case)
    assert all(steps == first for steps in others)
    scales = [scale for _, scale in first]
    assert first[-1][0] and len(first) > 2
    assert scales == sorted(scales, reverse=True) and scales[0] == 2.0**16 and scales[-1] < scales[0]


def evaluate_between_steps(case: Case) -> dict[str, Any]:
    """Two steps with validation between them, on the batches of the second, and two steps without."""
    from tests.helpers.pipeline import build_engine, microbatches_of, state_bytes

    def run(*, evaluates: bool) -> dict[str, Any]:
        engine = build_engine(case)
        engine.train_step(microbatches_of(engine, case, 0))
        found: dict[str, Any] = {}
        if evaluates:
            engine.synchronise_parameters()
            before = state_bytes(engine)
            batch = microbatches_of(engine, case, 1)
            found = {"once": engine.evaluate([batch]), "twice": engine.evaluate([batch, batch])}
            found["is_unchanged"] = state_bytes(engine) == before
        result = engine.train_step(microbatches_of(engine, case, 1))
        engine.synchronise_parameters()
        return {**found, "metrics": result.metrics, "norm": result.outcome.grad_norm, "state": state_bytes(engine)}

    with_validation, without = run(evaluates=True), run(evaluates=False)
    same = ("metrics", "norm", "state")
    with_validation["same"] = [with_validation[name] == without[name] for name in same]
    del with_validation["state"]
    return with_validation


@cases(
    make_case(PP2X2_DP2_SHARDED),
    make_case(replace(PP2_TP2, recompute_granularity="full")),
    make_case(PP2_DP2_SHARDED, fp16=True, loss_scale=256.0),
    make_case(PP4X2, bf16=True),
)
def test_validation_has_the_losses_of_training_and_leaves_no_trace(case: Case, pool: Pool) -> None:
    for found in pool(4).run(evaluate_between_steps, case):
        assert found["is_unchanged"] and all(found["same"])
        assert found["once"] == found["metrics"]
        assert found["twice"] == pytest.approx(found["once"], rel=1e-12)
