"""The trained additive bias of self-attention: bucketed relative positions, one table per layer (METRO) or stack (T5).

The bias depends on a query and a key only through their distance, so a table is read once per distance, and the
values are then laid out along the diagonals of the score matrix.
Shape letters: n local heads, l distances, q queries, k keys.
"""

from functools import lru_cache
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter, functional

from megatron_metro.config.schema import ModelConfig
from megatron_metro.model.buckets import metro_buckets, t5_buckets
from megatron_metro.parallel.groups import ProcessGroup


def expand_diagonals(values_NL: Tensor, query_length: int, key_length: int) -> Tensor:
    """[n, q + k - 1] values per distance, from 1 - q to k - 1, to the matrix [n, q, k] with one value per diagonal."""
    bias: Tensor = _ExpandDiagonals.apply(values_NL, query_length, key_length)
    return bias


class RelativeBias(MegatronModule):
    """A bias table [num_buckets, local heads], sharded over tensor-parallel ranks along its heads."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        *,
        is_decoder: bool,
        tp_group: ProcessGroup,
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.kind, self.is_decoder = model.relative_attention_bucket, is_decoder
        self.max_distance = model.relative_attention_max_distance
        local_heads = config.num_attention_heads // tp_group.size()
        device = torch.cuda.current_device()
        self.weight = Parameter(
            torch.empty(model.relative_attention_num_buckets, local_heads, device=device, dtype=config.params_dtype)
        )
        set_tensor_model_parallel_attributes(self.weight, True, 1, 1)

    def forward(self, query_length: int, key_length: int, first_query: int = 0) -> Tensor:
        """The bias [1, n, q, k] to add to the scaled scores, in the dtype of the table; a new graph on every call.

        Queries stand at positions from `first_query` on, keys at positions from 0 on.
        """
        num_buckets = self.weight.shape[0]
        distances = range(1 - query_length - first_query, key_length - first_query)
        buckets_L = _buckets_of_all_distances(
            self.kind, num_buckets, self.max_distance, self.is_decoder, distances, self.weight.device
        )
        values_NL = functional.embedding(buckets_L, self.weight).t()
        return expand_diagonals(values_NL, query_length, key_length)[None]


class _ExpandDiagonals(torch.autograd.Function):
    """Forward: a matrix with one value per diagonal. Backward: the sum along each diagonal."""

    @staticmethod
    def forward(ctx: Any, values_NL: Tensor, query_length: int, key_length: int) -> Tensor:
        assert values_NL.shape[1] == query_length + key_length - 1
        # Window i of the values is the row of query q-1-i; reversing the windows is one plain copy.
        return values_NL.contiguous().unfold(1, key_length, 1).flip(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient_NQK,) = grad_outputs
        n, q, k = gradient_NQK.shape
        length = q + k - 1
        # Each row right-aligned in a row of `length`; read with rows one longer, every row has moved one further left,
        # so that a diagonal is a column. What a row reads beyond its end are the zeros on the left of the next one.
        size = q * length + q - 1
        skewed = gradient_NQK.new_zeros(n, size)
        skewed[:, : q * length].view(n, q, length)[:, :, q - 1 :] = gradient_NQK
        return skewed.as_strided((n, q, length), (size, length + 1, 1)).sum(dim=1), None, None


@lru_cache(maxsize=64)
def _buckets_of_all_distances(
    kind: str,
    num_buckets: int,
    max_distance: int,
    is_decoder: bool,
    all_distances: range,
    device: torch.device,
) -> Tensor:
    # Computed on the CPU, so that every device puts a distance at the edge of a bucket into the same one.
    distances = torch.arange(all_distances.start, all_distances.stop, device=torch.device("cpu"))
    if kind == "metro":
        buckets = metro_buckets(distances, num_buckets, max_distance)
    else:
        buckets = t5_buckets(distances, num_buckets, max_distance, is_causal=is_decoder)
    return buckets.to(device)
