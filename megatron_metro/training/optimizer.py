"""AdamW or Adafactor in megatron-core's optimizers: data-parallel wrapping, construction, one update, norms.

Weight decay applies to every parameter, biases and norms included, as in the reference (metro_t0_reference section 5).

Epsilon. torch and NVIDIA's fused kernels compute sqrt(v / (1 - b2^t)) + eps; the reference adds eps to the uncorrected
sqrt(v), which acts like eps / sqrt(1 - b2^t): 7 times larger at the first update with b2 = 0.98, 0.7 % after 200. A
deliberate difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import MegatronModule, param_is_not_shared
from torch import Tensor

from megatron_metro.config.schema import OptimizerConfig, ParallelConfig, RunConfig
from megatron_metro.parallel.groups import ParallelGroups, all_reduce_sum, holds_first_rank
from megatron_metro.training.adafactor import Adafactor, list_parts


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """What one call of `optimizer_step` did; the same on every rank."""

    updated: bool  # False: no weight and no optimizer state changed
    grad_norm: float  # of the whole model, before clipping, without the loss scale; inf or nan if a gradient has any
    loss_scale: float  # by which this step's losses were multiplied; 1.0 except in FP16


def ddp_config(optimizer: OptimizerConfig, parallel: ParallelConfig) -> DistributedDataParallelConfig:
    """How gradients are reduced: in FP32 when the weights are BF16 or FP16, otherwise in the weights' own type."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=optimizer.bf16 or optimizer.fp16,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        # The interleaved schedule starts every chunk's gathers itself; the hooks of core's modules must not do it too.
        align_param_gather=parallel.num_virtual_stages_per_pipeline_rank > 1,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        # `optimizer_step` looks at the norm of the reduced gradients instead and skips the update on every rank; core's
        # check ends one rank before the reduction and leaves the others waiting.
        check_for_nan_in_grad=False,
    )


def wrap(config: RunConfig, chunks: Sequence[MegatronModule], groups: ParallelGroups) -> list[DistributedDataParallel]:
    """Each chunk of this rank in core's DistributedDataParallel, which keeps gradients in `main_grad`.

    Mark shared weights before: buckets are laid out here.
    """
    shared_config = ddp_config(config.optimizer, config.parallel)
    return [
        DistributedDataParallel(
            chunk.config,
            shared_config,
            chunk,
            # As Megatron does: with several chunks only the first one's reduction is on the critical path.
            disable_bucketing=index > 0,
            pg_collection=groups.collection,
        )
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(
    config: RunConfig, chunks: Sequence[DistributedDataParallel], groups: ParallelGroups
) -> MegatronOptimizer:
    """The optimizer of all parameters of this rank's wrapped chunks.

    FP32Optimizer for FP32 (and for float64 weights, which tests use), FP32 main weights beside BF16 or FP16 ones,
    DistributedOptimizer with --use-distributed-optimizer. Its learning rate is 0 until `set_learning_rate`.
    """
    # An empty dictionary, not None: with None core leaves biases and vectors without weight decay.
    chained = get_megatron_optimizer(
        _core_config(config.optimizer, config.parallel),
        list(chunks),
        config_overrides={},
        use_gloo_process_groups=False,
        pg_collection=groups.collection,
    )
    # One of dense parameters; core's second would hold those of experts.
    (optimizer,) = chained.chained_optimizers
    if config.optimizer.optimizer == "adafactor":
        _put_adafactor(optimizer, config, chunks, groups)
    else:
        _choose_fused_kernel(optimizer.optimizer)
    set_learning_rate(optimizer, 0.0)
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, value: float) -> None:
    """The rate of the updates to come."""
    for group in optimizer.param_groups:
        group["lr"] = value


@torch.no_grad()
def optimizer_step(optimizer: MegatronOptimizer, *, may_update: bool = True) -> StepOutcome:
    """Clip the reduced gradients and update the weights if they are finite on every rank and `may_update` is true.

    Collective over all ranks; `may_update` is the same on all of them.

    Core's own `step` is taken apart for two reasons: it rounds the norm to float32, whatever the gradients are (the
    clipping factor then differs between layouts at 1e-7), and outside FP16 it lets a gradient that is not finite into
    the weights.
    """
    loss_scale = float(optimizer.get_loss_scale())
    found_inf = optimizer.prepare_grads()
    grad_norm = gradient_norm(optimizer)
    if found_inf or not may_update or not math.isfinite(grad_norm):
        return StepOutcome(updated=False, grad_norm=grad_norm, loss_scale=loss_scale)
    if optimizer.config.clip_grad > 0.0:
        clip_grad_by_total_norm_fp32(optimizer.get_parameters(), optimizer.config.clip_grad, grad_norm)
    updated = optimizer.step_with_ready_grads()
    return StepOutcome(updated=updated, grad_norm=grad_norm, loss_scale=loss_scale)


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """L2 norm of the whole model's gradients as `prepare_grads` left them; collective over all ranks.

    A weight that lives on several stages, or whole on every tensor-parallel rank, counts once. All copies on all ranks
    are looked at, though: the norm is nan when any of them has an entry that is not finite.
    """
    parameters = [parameter for parameter in optimizer.get_parameters() if parameter.grad is not None]
    counted = [parameter for parameter in parameters if _is_counted(parameter, optimizer)]
    others = [parameter for parameter in parameters if not _is_counted(parameter, optimizer)]
    local = torch.zeros(2, dtype=torch.float64, device=optimizer.get_loss_scale().device)
    if parameters:
        norms = torch.stack(torch._foreach_norm([parameter.grad for parameter in [*counted, *others]])).double()
        local[1] = (~norms.isfinite()).sum()
        # Every data-parallel replica has the same sum unless the optimizer is sharded over them: then one speaks.
        if holds_first_rank(optimizer.get_grad_stats_parallel_group()):
            local[0] = norms[: len(counted)].square().sum()
    square, num_broken = all_reduce_sum(local, None).tolist()
    return math.nan if num_broken else math.sqrt(square)


@torch.no_grad()
def parameter_norm(optimizer: MegatronOptimizer) -> float:
    """L2 norm of the whole model's weights (the FP32 main weights where there are some); collective."""
    counted = [parameter.detach() for parameter in optimizer.get_parameters() if _is_counted(parameter, optimizer)]
    square = torch.zeros((), dtype=torch.float64, device=optimizer.get_loss_scale().device)
    if counted:
        square += torch.stack(torch._foreach_norm(counted)).double().square().sum()
    return math.sqrt(all_reduce_sum(square, optimizer.get_grad_stats_parallel_group()).item())


def _is_counted(parameter: Tensor, optimizer: MegatronOptimizer) -> bool:
    """Whether this rank is the one that counts a weight in norms."""
    is_original: bool = param_is_not_shared(parameter)
    return is_original and param_is_not_tensor_parallel_duplicate(parameter, optimizer.tp_group)


def _core_config(optimizer: OptimizerConfig, parallel: ParallelConfig) -> CoreOptimizerConfig:
    return CoreOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=optimizer.bf16,
        fp16=optimizer.fp16,
        params_dtype=torch.bfloat16 if optimizer.bf16 else torch.float16 if optimizer.fp16 else torch.float32,
        loss_scale=optimizer.loss_scale if optimizer.fp16 else None,
        initial_loss_scale=optimizer.initial_loss_scale,
        min_loss_scale=optimizer.min_loss_scale,
        loss_scale_window=optimizer.loss_scale_window,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )


def _put_adafactor(
    optimizer: MegatronOptimizer, config: RunConfig, chunks: Sequence[DistributedDataParallel], groups: ParallelGroups
) -> None:
    """Replace the AdamW that core knows, which holds no state before its first step.

    The rest of core's optimizer stays: main weights beside BF16 and FP16 ones, loss scaler, what is counted in norms.
    """
    assert not config.parallel.use_distributed_optimizer, "refused by validation"
    parts = list_parts(chunks, groups)
    mains = {getattr(parameter, "main_param", parameter): part for parameter, part in parts.items()}
    assert mains.keys() == set(optimizer.get_parameters()), "core's optimizer holds other parameters than the chunks"
    optimizer.optimizer = Adafactor(list(mains), list(mains.values()), config.optimizer, groups)
    optimizer.init_state_fn = lambda adafactor, _: adafactor.prepare_state()


def _choose_fused_kernel(adam: torch.optim.Optimizer) -> None:
    """torch's AdamW in one pass per tensor (a quarter of the time of the loop that core's construction leads to)."""
    if isinstance(adam, torch.optim.AdamW):
        for group in adam.param_groups:
            group["fused"] = True
