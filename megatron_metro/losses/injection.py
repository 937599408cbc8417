"""Train a loss where it is computed, in the middle of the pipeline (design section 4, fused loss)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def inject_loss(activation: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """The activation, unchanged; its backward pass also back-propagates `scale` x `loss` (scalars).

    Pipeline schedules back-propagate only what a stage sends on, so the loss travels with the activation. The result
    is a view of `activation`. Keep the call outside regions that are recomputed.
    """
    injected: Tensor = _Injection.apply(activation, loss, scale)
    return injected


class _Injection(torch.autograd.Function):
    """Forward: identity of the activation. Backward: its gradient untouched, and the scale as the loss's gradient."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.loss_gradient = scale.detach().to(loss).reshape(loss.shape)
        return activation.view_as(activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_outputs[0], ctx.loss_gradient, None
