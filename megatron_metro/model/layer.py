"""One transformer layer, Post-LN (METRO) or Pre-LN (T5), around megatron-core's attention and MLP.

Shape letters: s positions (the rank's shard under sequence parallelism), b sequences, h width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_metro.model.packed_rows import take_queries
from megatron_metro.model.past import LayerPast
from megatron_metro.model.slots import shorten_to_slots
from megatron_metro.model.specs import LayerSpec

SublayerOutput = tuple[Tensor, Tensor | None]  # megatron-core returns a linear's output and its bias apart
Sublayer = Callable[[Tensor], SublayerOutput]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """What distinguishes one layer from another."""

    number: int  # from 0 within its network
    is_decoder: bool  # causal self-attention, and cross-attention after it
    is_post_norm: bool
    recompute: bool  # forget the layer's activations and compute them again in the backward pass


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionInputs:
    """What a layer reads besides its hidden states."""

    bias: Tensor | None = None  # [1, local heads, s, s] relative bias of the self-attention
    mask: Tensor | None = None  # bool [b, 1, 1 or s, s], True at keys the self-attention must ignore
    context: Tensor | None = None  # [s, b, h] encoder output
    context_mask: Tensor | None = None  # bool [b, 1, 1 or t, s], of t positions of the decoder
    slots: Tensor | None = None  # int64 [b, m]: ask only for these positions (unused slots: one past the end)

    def at_slots(self, slots_BM: Tensor, length: int, *, is_causal: bool) -> "AttentionInputs":
        """The same inputs for queries at slots: their rows of bias and masks, and the causal order in the mask."""
        positions = slots_BM.clamp(max=length - 1)
        bias, mask = self.bias, take_queries(self.mask, positions)
        if bias is not None:
            bias = bias[0][:, positions].transpose(0, 1)
        if is_causal:
            future = torch.arange(length, device=positions.device) > positions[:, None, :, None]
            mask = future if mask is None else mask | future
        context_mask = take_queries(self.context_mask, positions)
        return replace(self, bias=bias, mask=mask, context_mask=context_mask, slots=slots_BM)


class TransformerLayer(MegatronModule):
    """Self-attention, cross-attention in a decoder, feed-forward; each with residual, dropout and norm."""

    def __init__(
        self, config: TransformerConfig, spec: LayerSpec, plan: LayerPlan, collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.plan, self.tp_group = plan, collection.tp
        self.self_attention_norm = spec.norm(config, config.hidden_size)
        self.self_attention = build_module(
            spec.self_attention,
            config=config,
            layer_number=plan.number + 1,
            attn_mask_type=AttnMaskType.causal if plan.is_decoder else AttnMaskType.padding,
            pg_collection=collection,
        )
        if plan.is_decoder:
            self.cross_attention_norm = spec.norm(config, config.hidden_size)
            self.cross_attention = build_module(
                spec.cross_attention,
                config=config,
                layer_number=plan.number + 1,
                attn_mask_type=AttnMaskType.padding,
                pg_collection=collection,
            )
        self.mlp_norm = spec.norm(config, config.hidden_size)
        self.mlp = build_module(spec.mlp, config=config, ffn_hidden_size=config.ffn_hidden_size, tp_group=collection.tp)

    def forward(self, hidden_SBH: Tensor, inputs: AttentionInputs) -> Tensor:
        """[s, b, h] to [s, b, h], or to [m, b, h] where `inputs` names the m slots that are asked for."""
        tensors = (inputs.bias, inputs.mask, inputs.context, inputs.context_mask, inputs.slots)
        if self.plan.recompute and self.training:
            return tensor_parallel.checkpoint(self._sublayers, False, hidden_SBH, *tensors)
        return self._sublayers(hidden_SBH, *tensors)

    def _sublayers(
        self,
        hidden_SBH: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        context: Tensor | None,
        context_mask: Tensor | None,
        slots: Tensor | None,
    ) -> Tensor:
        sequence = None
        if slots is not None:
            sequence = hidden_SBH if self.plan.is_post_norm else self.self_attention_norm(hidden_SBH)
            hidden_SBH = shorten_to_slots(hidden_SBH, slots, self.config, self.tp_group)

        def attend(x: Tensor) -> SublayerOutput:
            return self.self_attention(x, mask, key_value_states=sequence, attention_bias=bias)

        def cross_attend(x: Tensor) -> SublayerOutput:
            return self.cross_attention(x, context_mask, key_value_states=context)

        return self._chain(hidden_SBH, attend, cross_attend)

    def remember(self, context_SBH: Tensor) -> LayerPast:
        """What a decoder layer knows before the first token is written: [s, b, h] encoder output, projected."""
        return LayerPast(source=self.cross_attention.remember(context_SBH))

    def write(self, hidden_TRH: Tensor, past: LayerPast, bias: Tensor | None, source_mask: Tensor | None) -> Tensor:
        """[t, r, h] to [t, r, h] at new positions: several at the beginning, later one at a time; `past` grows.

        The rows of a source stand side by side (beams, choices). Cross-attention has no order of queries, so to it they
        are further positions of one sequence, and its keys are neither copied nor read for each of them.
        """
        t, r, h = hidden_TRH.shape
        assert t == 1 or past.own.length == 0, "several positions at once would need a causal mask of their own"
        b = past.source.key.shape[1]

        def attend(x: Tensor) -> SublayerOutput:
            return self.self_attention(x, None, key_value_states=past.own, attention_bias=bias)

        def cross_attend(x: Tensor) -> SublayerOutput:
            queries = x.view(t, b, r // b, h).transpose(1, 2).reshape(-1, b, h)
            output, output_bias = self.cross_attention(queries, source_mask, key_value_states=past.source)
            return output.view(t, r // b, b, h).transpose(1, 2).reshape(t, r, h), output_bias

        return self._chain(hidden_TRH, attend, cross_attend)

    def _chain(self, hidden: Tensor, attend: Sublayer, cross_attend: Sublayer) -> Tensor:
        hidden = self._residual(hidden, self.self_attention_norm, attend)
        if self.plan.is_decoder:
            hidden = self._residual(hidden, self.cross_attention_norm, cross_attend)
        return self._residual(hidden, self.mlp_norm, self.mlp)

    def _residual(self, hidden: Tensor, norm: MegatronModule, sublayer: Sublayer) -> Tensor:
        output, bias = sublayer(hidden if self.plan.is_post_norm else norm(hidden))
        if bias is not None:
            output = output + bias
        hidden = hidden + functional.dropout(output, self.config.hidden_dropout, self.training)
        return norm(hidden) if self.plan.is_post_norm else hidden
