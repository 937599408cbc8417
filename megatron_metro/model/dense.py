"""Linear layers of our own: outside the transformer layers, in heads and between networks of different widths; and
the second of T5's feed-forward layers, with dropout on what it reads.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from megatron.core.tensor_parallel import RowParallelLinear, get_cuda_rng_tracker
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


class DroppingLinear(RowParallelLinear):
    """A row-parallel layer with the hidden dropout of its network on its input (T5's feed-forward activations)."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, this rank's share of the width] to [s, b, h]."""
        rate = self.config.hidden_dropout if self.training else 0.0
        with split_dropout_rng(self.config, rate):
            output: tuple[Tensor, Tensor | None] = super().forward(functional.dropout(input_, rate))
        return output


def split_dropout_rng(config: TransformerConfig, rate: float) -> AbstractContextManager[None]:
    """The random state for what tensor-parallel ranks hold different parts of, heads or activations.

    Each draws its own dropout; under sequence parallelism the whole layer already runs in that state.
    """
    if rate == 0.0 or config.sequence_parallel:
        return nullcontext()
    fork: AbstractContextManager[None] = get_cuda_rng_tracker().fork()
    return fork
