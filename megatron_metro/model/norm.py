"""LayerNorm and RMSNorm whose weights say that they see only a shard of the sequence."""

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter, functional


class Norm(MegatronModule):
    """The norm named by `config.normalization`; torch's LayerNorm wrapper in megatron-core refuses sequence parallel.

    `sees_shard` is True where the input is sharded along the sequence under sequence parallelism: megatron-core then
    sums the gradients over the tensor-parallel group. On gathered slots it is False.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, *, sees_shard: bool = True) -> None:
        super().__init__(config)
        device = torch.cuda.current_device()
        self.weight = Parameter(torch.empty(hidden_size, device=device, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = Parameter(torch.empty(hidden_size, device=device, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel and sees_shard  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension; any leading shape."""
        shape, epsilon = self.weight.shape, self.config.layernorm_epsilon
        if self.bias is None:
            return functional.rms_norm(hidden, shape, self.weight, epsilon)
        return functional.layer_norm(hidden, shape, self.weight, self.bias, epsilon)
