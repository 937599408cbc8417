"""The optimizer in every layout: same updates, same norms, weight decay everywhere, bad gradients change nothing."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_metro.config.schema import OptimizerConfig, ParallelConfig, RunConfig
from megatron_metro.parallel.groups import reinitialise
from megatron_metro.training.optimizer import (
    build_optimizer,
    optimizer_step,
    parameter_norm,
    set_learning_rate,
    wrap,
)
from tests.distributed.tiny_model import SHAPES, build_pieces, full_tensor, local_part, named_parameters, set_gradients

LR = 1e-2
OPTIMIZER = OptimizerConfig(lr=LR, weight_decay=0.1, adam_beta2=0.98, adam_eps=1e-6, clip_grad=1.0)
NUM_STEPS = 3


def expected_weights(
    num_steps: int = NUM_STEPS, clip_grad: float = 1.0, start_dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """AdamW written down: decay on every parameter, gradients clipped by the norm of the whole model.

    `start_dtype` rounds the first weights, as those of a BF16 model are before it keeps FP32 main weights.
    """
    weights = {name: full_tensor(name, 0).to(start_dtype).double() for name in SHAPES}
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(1, num_steps + 1):
        norm = expected_norm(step)
        factor = min(1.0, clip_grad / (norm + 1e-6)) if clip_grad else 1.0
        for name, weight in weights.items():
            gradient = full_tensor(name, step) * factor
            first[name].lerp_(gradient, 0.1)
            second[name].mul_(0.98).addcmul_(gradient, gradient, value=0.02)
            weight.mul_(1 - LR * 0.1)
            denominator = (second[name] / (1 - 0.98**step)).sqrt() + 1e-6
            weight.sub_(LR * first[name] / (1 - 0.9**step) / denominator)
    return weights


def expected_norm(step: int) -> float:
    return math.sqrt(sum(full_tensor(name, step).square().sum().item() for name in SHAPES))


def train(parallel: ParallelConfig, optimizer_config: OptimizerConfig, dtype: torch.dtype, clip_grad: float) -> None:
    """Update the model three times and compare what this rank holds with the formulas."""
    groups = reinitialise(parallel)
    config = RunConfig(parallel=parallel, optimizer=replace(optimizer_config, clip_grad=clip_grad))
    chunks = wrap(config, build_pieces(groups, parallel.num_virtual_stages_per_pipeline_rank, dtype), groups)
    optimizer = build_optimizer(config, chunks, groups)
    set_learning_rate(optimizer, LR)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for step in range(1, NUM_STEPS + 1):
        set_gradients(chunks, step, groups, scale=float(optimizer.get_loss_scale()))
        outcome = optimizer_step(optimizer)
        assert outcome.updated
        assert outcome.grad_norm == pytest.approx(expected_norm(step), rel=tolerance)
    if dtype in (torch.bfloat16, torch.float16):
        tolerance = 4e-3  # half a unit in the last place of BF16
    expected = expected_weights(clip_grad=clip_grad, start_dtype=dtype)
    for name, parameter in named_parameters(chunks):
        wanted = local_part(expected[name], parameter, name, groups)
        torch.testing.assert_close(parameter.detach().double(), wanted, rtol=tolerance, atol=tolerance)
    if dtype == torch.float64:
        norm = math.sqrt(sum(weight.square().sum().item() for weight in expected.values()))
        assert parameter_norm(optimizer) == pytest.approx(norm, rel=1e-12)


def _parallel(tp: int, pp: int = 1, vpp: int = 1, *, distributed: bool = False) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        num_virtual_stages_per_pipeline_rank=vpp,
        use_distributed_optimizer=distributed,
    )


HALF = replace(OPTIMIZER, bf16=True)
CASES = [
    pytest.param(_parallel(1), OPTIMIZER, torch.float64, 1.0, id="dp2-float64"),
    pytest.param(_parallel(2), OPTIMIZER, torch.float64, 1.0, id="tp2-float64"),
    pytest.param(_parallel(1, 2, 2), OPTIMIZER, torch.float64, 1.0, id="pp2-vpp2-float64"),
    pytest.param(_parallel(1, 2), OPTIMIZER, torch.float64, 0.0, id="pp2-float64-no-clipping"),
    pytest.param(_parallel(1, distributed=True), OPTIMIZER, torch.float32, 1.0, id="dp2-distributed"),
    pytest.param(_parallel(1, distributed=True), OPTIMIZER, torch.float32, 0.0, id="dp2-distributed-no-clipping"),
    pytest.param(_parallel(1, distributed=True), HALF, torch.bfloat16, 1.0, id="dp2-distributed-bf16"),
    pytest.param(_parallel(2), HALF, torch.bfloat16, 1.0, id="tp2-bf16"),
    pytest.param(_parallel(2), replace(OPTIMIZER, fp16=True), torch.float16, 1.0, id="tp2-fp16"),
]


@pytest.mark.parametrize(("parallel", "optimizer", "dtype", "clip_grad"), CASES)
def test_updates_and_norms_do_not_depend_on_the_layout(pool, parallel, optimizer, dtype, clip_grad):
    pool(2).run(train, parallel, optimizer, dtype, clip_grad)


def meet_bad_gradient(distributed: bool, fp16: bool) -> tuple[bool, float, float]:
    """One rank's gradient is not finite; returns what the step said."""
    parallel = _parallel(1, distributed=True) if distributed else _parallel(2)
    groups = reinitialise(parallel)
    config = RunConfig(parallel=parallel, optimizer=replace(OPTIMIZER, fp16=fp16, initial_loss_scale=8.0))
    dtype = torch.float16 if fp16 else torch.float32
    chunks = wrap(config, build_pieces(groups, 1, dtype), groups)
    optimizer = build_optimizer(config, chunks, groups)
    set_learning_rate(optimizer, LR)
    before = {name: parameter.detach().clone() for name, parameter in named_parameters(chunks)}
    set_gradients(chunks, 1, groups)
    if groups.rank == 1:
        for _, parameter in named_parameters(chunks):
            parameter.main_grad.view(-1)[-1] = math.inf
    outcome = optimizer_step(optimizer)
    for name, parameter in named_parameters(chunks):
        assert torch.equal(parameter, before[name])
    assert not any(optimizer.optimizer.state.values())
    return outcome.updated, outcome.grad_norm, outcome.loss_scale


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("fp16", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing_on_any_rank(pool, distributed, fp16):
    for updated, grad_norm, loss_scale in pool(2).run(meet_bad_gradient, distributed, fp16):
        assert not updated
        assert not math.isfinite(grad_norm)
        assert loss_scale == (8.0 if fp16 else 1.0)
