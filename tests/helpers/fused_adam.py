"""Stand-ins for the Adams of Transformer Engine and apex: plain arithmetic, their constructors and places of state.

Both count updates in the parameter group, from the first step on, and make moments when they first see a gradient. Both
can keep the count in a tensor (capturable). Transformer Engine's passes over groups of which a rank owns nothing, whose
count then stays behind. torch's AdamW counts beside each parameter's moments instead.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core import optimizer as core_optimizer
from megatron.core.optimizer import distrib_optimizer

from tests.helpers.mutations import replaced_attribute


class FusedAdam(torch.optim.Optimizer):
    """What both have in common."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        assert adam_w_mode, "weight decay is decoupled"
        self.capturable = capturable

    def initialize_state(self, parameter: torch.Tensor) -> None:
        zeros = {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        self.state[parameter].update(zeros)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["params"] and isinstance(self, TransformerEngineAdam):
                continue
            if "step" in group:
                group["step"] += torch.tensor(1, dtype=torch.int) if self.capturable else 1
            else:
                group["step"] = torch.tensor([1], dtype=torch.int) if self.capturable else 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter)

    def _update(self, group: dict[str, Any], parameter: torch.Tensor) -> None:
        state, count, (beta1, beta2) = self.state[parameter], int(group["step"]), group["betas"]
        if len(state) == 0:
            self.initialize_state(parameter)
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first.lerp_(parameter.grad, 1 - beta1)
        second.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = second.sqrt().div_(math.sqrt(1 - beta2**count)).add_(group["eps"])
        parameter.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**count))


class ApexAdam(FusedAdam):
    """apex.optimizers.FusedAdam."""


class TransformerEngineAdam(FusedAdam):
    """transformer_engine.pytorch.optimizers.FusedAdam."""


class CapturableAdam(TransformerEngineAdam):
    """The same under CUDA graphs."""

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, capturable=True, **options)


KINDS: dict[str, type[FusedAdam] | None] = {
    "torch": None,
    "apex": ApexAdam,
    "te": TransformerEngineAdam,
    "te-capturable": CapturableAdam,
}


@contextmanager
def installed_adam(kind: str) -> Iterator[None]:
    """Core finds this Adam, as it would where the package is installed."""
    adam = KINDS[kind]
    with ExitStack() as stack:
        if adam is not None:
            stack.enter_context(replaced_attribute(core_optimizer, "Adam", adam))
            stack.enter_context(replaced_attribute(core_optimizer, "USING_PYTORCH_OPTIMIZER", False))
            stack.enter_context(replaced_attribute(distrib_optimizer, "Adam", adam))
        yield
