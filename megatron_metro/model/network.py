"""The part of one network (generator, encoder or decoder) that a piece of the chain holds.

Shape letters: s positions (the rank's shard under sequence parallelism), b sequences, h width.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter, functional

from megatron_metro.config.chain import Network
from megatron_metro.config.network_sizes import has_projected_embedding
from megatron_metro.config.schema import ModelConfig
from megatron_metro.model.dense import Dense
from megatron_metro.model.layer import AttentionInputs, LayerPlan, TransformerLayer
from megatron_metro.model.packed_rows import count_positions
from megatron_metro.model.past import LayerPast, WritingState
from megatron_metro.model.relative_bias import RelativeBias
from megatron_metro.model.specs import LayerSpec
from megatron_metro.parallel.groups import ProcessGroup

# Row 0 of a position table is unused and row 1 belongs to padding, as in the reference (section 1.4).
FIRST_POSITION_ROW = 2
PADDING_POSITION_ROW = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkPlan:
    """Which parts of a network live here."""

    network: Network
    layers: tuple[int, ...]
    embeds: bool  # positions and embedding norm
    projects: bool  # from the width of the embeddings to the network's own, if they differ
    ends: bool  # final norm
    recompute: bool  # full recomputation of every layer


class NumberedLayers(MegatronModule):
    """Layers under their number in the network, so that parameter names do not depend on the layout."""

    def __init__(self, config: TransformerConfig, layers: dict[int, TransformerLayer]) -> None:
        super().__init__(config)
        for number, layer in layers.items():
            self.add_module(str(number), layer)

    def __getitem__(self, number: int) -> TransformerLayer:
        layer = self._modules[str(number)]
        assert isinstance(layer, TransformerLayer)
        return layer

    def __iter__(self) -> Iterator[TransformerLayer]:
        return (self[int(number)] for number in self._modules)


class PositionEmbeddings(MegatronModule):
    """Learned absolute positions; every rank holds the whole table and reads the rows of its shard."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, collection: ProcessGroupCollection) -> None:
        super().__init__(config)
        self.tp_group = collection.tp
        rows = model.max_position_embeddings + FIRST_POSITION_ROW
        device = torch.cuda.current_device()
        self.weight = Parameter(torch.empty(rows, model.hidden_size, device=device, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, length: int, padding: Tensor | None, start: int = 0, segments: Tensor | None = None) -> Tensor:
        """Rows for [s] or, with padding (bool [b, length], True at pad), for [s, b]: [s, 1 or b, h].

        Without padding the first position may be another than 0. In packed rows, with segments [b, length], positions
        begin anew with each example.
        """
        if segments is not None:
            rows = FIRST_POSITION_ROW + count_positions(segments).t()
            if padding is not None:
                rows = torch.where(padding.t(), PADDING_POSITION_ROW, rows)
        elif padding is None:
            first = FIRST_POSITION_ROW + start
            rows = torch.arange(first, first + length, device=self.weight.device)[:, None]
        else:
            real = (~padding).t()
            counted = real.cumsum(0) + (FIRST_POSITION_ROW - 1)
            rows = torch.where(real, counted, PADDING_POSITION_ROW)
        return functional.embedding(local_shard(rows, self.config, self.tp_group), self.weight)


class NetworkShare(MegatronModule):
    """The layers and ends of one network that its plan names."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        spec: LayerSpec,
        plan: NetworkPlan,
        collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.plan = plan
        self.tp_group = collection.tp
        self.is_decoder = plan.network == "decoder"
        has_bias = not self.is_decoder or model.relative_attention_decoder
        self.has_bias_per_layer = has_bias and model.relative_attention == "per_layer"
        if has_bias and model.relative_attention == "per_stack" and plan.layers:
            self.relative_bias = RelativeBias(config, model, is_decoder=self.is_decoder, tp_group=collection.tp)
        if plan.embeds and model.position_embedding_type == "learned_absolute":
            self.position_embeddings = PositionEmbeddings(config, model, collection)
        if plan.embeds and model.norm_placement == "post":
            self.embedding_norm = spec.norm(config, model.hidden_size)
        if plan.projects and has_projected_embedding(model):
            self.embedding_projection = Dense(
                config, model.hidden_size, config.hidden_size, sees_shard=True, has_bias=False
            )
        self.layers = NumberedLayers(config, {i: self._build_layer(model, spec, i, collection) for i in plan.layers})
        if plan.ends and model.norm_placement == "pre":
            self.final_norm = spec.norm(config, config.hidden_size)
            self.final_dropout = config.hidden_dropout if model.dropout_places == "t5" else 0.0

    def _build_layer(
        self, model: ModelConfig, spec: LayerSpec, number: int, collection: ProcessGroupCollection
    ) -> TransformerLayer:
        plan = LayerPlan(
            number=number,
            is_decoder=self.is_decoder,
            is_post_norm=model.norm_placement == "post",
            recompute=self.plan.recompute,
        )
        layer = TransformerLayer(self.config, spec, plan, collection)
        if self.has_bias_per_layer:
            layer.relative_bias = RelativeBias(self.config, model, is_decoder=self.is_decoder, tp_group=collection.tp)
        return layer

    def embed(
        self,
        words_SBH: Tensor,
        length: int,
        padding: Tensor | None,
        dropout: float,
        start: int = 0,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Word embeddings to the network's input: add positions from `start` on, norm, dropout (reference section 1.2).

        Rows at padding become zero in generator and encoder, as in the reference; a decoder has no padding here.
        """
        hidden = words_SBH
        if hasattr(self, "position_embeddings"):
            hidden = hidden + self.position_embeddings(length, padding, start, segments)
        if hasattr(self, "embedding_norm"):
            hidden = self.embedding_norm(hidden)
        with self.dropout_rng():
            hidden = functional.dropout(hidden, dropout, self.training)
        if padding is not None:
            hidden = hidden.masked_fill(local_shard(padding.t(), self.config, self.tp_group)[..., None], 0.0)
        return hidden

    def project(self, embedded_SBH: Tensor) -> Tensor:
        """Embeddings, as wide as the token matrix, to the network's width; rows that are zero stay so.

        The whole embedding (positions, norm) is made before, as in ELECTRA, so that it may be the encoder's.
        """
        return self.embedding_projection(embedded_SBH) if hasattr(self, "embedding_projection") else embedded_SBH

    def finish(self, hidden_SBH: Tensor) -> Tensor:
        """The stack's output: normalised in a Pre-LN stack, with T5's dropout after it; as it is in METRO's."""
        if not hasattr(self, "final_norm"):
            return hidden_SBH
        with self.dropout_rng():
            return functional.dropout(self.final_norm(hidden_SBH), self.final_dropout, self.training)

    def stack_bias(self, length: int) -> Tensor | None:
        """The relative bias [1, local heads, length, length] that all layers of the stack share (T5), if it does."""
        return self.relative_bias(length, length) if hasattr(self, "relative_bias") else None

    def run_layer(self, number: int, hidden_SBH: Tensor, length: int, inputs: AttentionInputs) -> Tensor:
        """One layer over `length` positions; its own bias is rebuilt for every microbatch.

        Where `inputs.slots` are given, the layer's output is needed at those positions only.
        """
        layer = self.layers[number]
        if self.has_bias_per_layer:
            inputs = replace(inputs, bias=layer.relative_bias(length, length))
        if inputs.slots is not None:
            inputs = inputs.at_slots(inputs.slots, length, is_causal=self.is_decoder)
        with self.dropout_rng():
            return layer(hidden_SBH, inputs)

    def remember(self, context_SBH: Tensor) -> dict[int, LayerPast]:
        """What the decoder's layers know before the first token, by their numbers: the encoder's output, projected."""
        return {number: self.layers[number].remember(context_SBH) for number in self.plan.layers}

    def write_layers(self, hidden_TRH: Tensor, state: WritingState) -> Tensor:
        """[t, r, h] to [t, r, h]: the decoder's layers at new positions (dropout is off)."""
        span = (hidden_TRH.shape[0], state.length + hidden_TRH.shape[0], state.length)
        bias = self.relative_bias(*span) if hasattr(self, "relative_bias") else None
        for number, past in state.layers.items():
            layer = self.layers[number]
            if self.has_bias_per_layer:
                bias = layer.relative_bias(*span)
            hidden_TRH = layer.write(hidden_TRH, past, bias, state.source_mask)
        return hidden_TRH

    def dropout_rng(self) -> AbstractContextManager[None]:
        """Under sequence parallelism ranks hold different rows, so each draws its own dropout."""
        if self.config.sequence_parallel:
            return tensor_parallel.get_cuda_rng_tracker().fork()
        return nullcontext()


def local_shard(rows: Tensor, config: TransformerConfig, tp_group: ProcessGroup) -> Tensor:
    """The slice of the first dimension that this tensor-parallel rank holds under sequence parallelism."""
    if not config.sequence_parallel:
        return rows
    return rows.chunk(tp_group.size())[tp_group.rank()]
