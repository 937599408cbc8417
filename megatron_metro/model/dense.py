"""A linear layer outside the transformer layers: in heads, and between networks of different widths."""

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter, functional


class Dense(MegatronModule):
    """A linear layer that every tensor-parallel rank holds whole.

    `sees_shard` as in `norm.Norm`: whether its input is sharded along the sequence under sequence parallelism.
    """

    def __init__(
        self, config: TransformerConfig, in_size: int, out_size: int, *, sees_shard: bool, has_bias: bool = True
    ) -> None:
        super().__init__(config)
        device = torch.cuda.current_device()
        self.weight = Parameter(torch.empty(out_size, in_size, device=device, dtype=config.params_dtype))
        self.bias = None
        if has_bias:
            self.bias = Parameter(torch.empty(out_size, device=device, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel and sees_shard  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in_size] to [..., out_size]."""
        return functional.linear(hidden, self.weight, self.bias)
