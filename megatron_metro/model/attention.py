"""Attention scores with a trained additive bias: the part megatron-core's local attention refuses.

Shape letters: s query positions, k key positions, b sequences, n local heads, d head size.
"""

import math
from typing import Literal

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.attention import CrossAttention, SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_metro.model.dense import split_dropout_rng
from megatron_metro.model.past import OwnPast, SourcePast


class BiasedAttention(MegatronModule):
    """softmax(scale q k^T + bias) v, the bias added after scaling (reference section 1.3).

    A drop-in for megatron-core's core attention. With `recompute_scores` the scores are recomputed in the backward
    pass; the bias is an explicit input of the recomputed region, so its gradient survives.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        recompute_scores: bool = False,
    ) -> None:
        super().__init__(config)
        assert config.kv_channels is not None
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout
        self.recompute_scores = recompute_scores

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[s, b, n, d] queries and [k, b, n, d] keys and values to [s, b, n*d].

        `attention_mask` is bool, True where a key must be ignored: [b, 1, 1, k] for padding, or [b, 1, s, k] in packed
        rows, or for queries at slots, which it then makes causal too. `attention_bias` is [1 or b, n, s, k]. A single
        query is the last position: nothing is in its future.
        """
        if self.recompute_scores and self.training:
            return tensor_parallel.checkpoint(self._attend, False, query, key, value, attention_mask, attention_bias)
        return self._attend(query, key, value, attention_mask, attention_bias)

    def _attend(
        self, query_SBND: Tensor, key_KBND: Tensor, value_KBND: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        s, b, n, d = query_SBND.shape
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_KBND, value_KBND))
        dropout = self.dropout if self.training else 0.0
        with split_dropout_rng(self.config, dropout):
            if bias is None:
                mask = self._allowed(mask, s, key.shape[2])
                context = functional.scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    attn_mask=mask,
                    dropout_p=dropout,
                    is_causal=self.is_causal and mask is None and s > 1,
                    scale=self.scale,
                )
            else:
                context = self._attend_with_bias(query, key, value, mask, bias, dropout)
        return context.permute(2, 0, 1, 3).reshape(s, b, n * d)

    def _attend_with_bias(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor, dropout: float
    ) -> Tensor:
        (b, n, s, d), k = query.shape, key.shape[2]
        query, key, value = (x.reshape(b * n, -1, d) for x in (query, key, value))
        rows = bias.to(query.dtype).expand(b, n, s, k).reshape(b * n, s, k)
        scores = torch.baddbmm(rows, query, key.transpose(1, 2), alpha=self.scale)
        allowed = self._allowed(mask, s, k)
        if allowed is None and self.is_causal and s > 1:
            allowed = torch.ones(s, k, dtype=torch.bool, device=scores.device).tril()
        if allowed is not None:
            scores = scores.view(b, n, s, k).masked_fill(~allowed, float("-inf")).view(b * n, s, k)
        wide = torch.float32 if query.dtype in (torch.bfloat16, torch.float16) else query.dtype
        probabilities = functional.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
        if dropout > 0.0:
            probabilities = functional.dropout(probabilities, dropout)
        return torch.bmm(probabilities, value).view(b, n, s, d)

    def _allowed(self, mask: Tensor | None, num_queries: int, num_keys: int) -> Tensor | None:
        """Where to attend, as torch wants it; None where nothing but the causal order restricts it."""
        if mask is None:
            return None
        allowed = ~mask
        if self.is_causal and num_queries == num_keys:  # queries at slots bring their own causal mask
            allowed = allowed & torch.ones(num_queries, num_keys, dtype=torch.bool, device=mask.device).tril()
        return allowed


class QkvLinear(ColumnParallelLinear):
    """The fused projection, which can also give the queries of one sequence and the keys and values of another.

    Rows are ordered by head: its queries, its keys, its values.
    """

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        part: Literal["query", "key_value"] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] to [s, b, heads * width of the part]; all three without a part, as core calls it."""
        if part is None:
            return super().forward(input_, weight, runtime_gather_output)
        rows = slice(0, 1) if part == "query" else slice(1, 3)
        head_size = self.config.kv_channels
        output = self._forward_impl(
            input=input_,
            weight=self.weight.view(-1, 3, head_size, self.input_size)[:, rows].reshape(-1, self.input_size),
            bias=None if self.bias is None else self.bias.view(-1, 3, head_size)[:, rows].reshape(-1),
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self.allreduce_dgrad,
            sequence_parallel=self.sequence_parallel,
            grad_output_buffer=None,
            wgrad_deferral_limit=None,
            tp_group=self.tp_group,
        )
        return output, None


class SlotSelfAttention(SelfAttention):
    """Self-attention whose queries may stand at a few slots of the sequence: `key_value_states` is the whole of it.

    Or it is what the positions before these have left; then the queries stand at new positions after them.
    """

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | OwnPast | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, ...]:
        """[m, b, h] queries' states and [s, b, h] of the sequence to [m, b, n, d] and twice [s, b, n, d]."""
        if key_value_states is None:
            return super().get_query_key_value_tensors(hidden_states, None, output_gate, split_qkv)
        if isinstance(key_value_states, OwnPast):
            query, key, value = super().get_query_key_value_tensors(hidden_states, None, output_gate, split_qkv)
            return query, *key_value_states.append(key, value)
        head_size = self.hidden_size_per_attention_head
        query, _ = self.linear_qkv(hidden_states, part="query")
        key_value, _ = self.linear_qkv(key_value_states, part="key_value")
        key, value = key_value.unflatten(-1, (-1, 2 * head_size)).chunk(2, dim=-1)
        return query.unflatten(-1, (-1, head_size)), key, value


class SourceAttention(CrossAttention):
    """Cross-attention that can project the encoder's output once and attend to it many times."""

    def remember(self, context_SBH: Tensor) -> SourcePast:
        """[s, b, h] encoder output to its keys and values, [s, b, n, d] each."""
        key_value, _ = self.linear_kv(context_SBH)
        key, value = key_value.unflatten(-1, (-1, 2 * self.hidden_size_per_attention_head)).chunk(2, dim=-1)
        return SourcePast(key.contiguous(), value.contiguous())  # read once per token

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | SourcePast | None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[t, b, h] queries' states and [s, b, h] of the encoder to [t, b, n, d] and twice [s, b, n, d]."""
        if not isinstance(key_value_states, SourcePast):
            query, key, value = super().get_query_key_value_tensors(
                hidden_states, key_value_states, output_gate, split_qkv
            )
            return query, key, value
        query, _ = self.linear_q(hidden_states)
        query = query.unflatten(-1, (-1, self.hidden_size_per_attention_head))
        return query, key_value_states.key, key_value_states.value
