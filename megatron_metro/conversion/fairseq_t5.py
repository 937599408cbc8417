"""METRO's released architecture, `fairseq_t5`, as a configuration and a model of transformers.

Names of weights are those of the released files (reference section 8.2). A Post-LN encoder-decoder with learned
positions whose encoder layers have a relative bias each. `megatron_metro.conversion.hf` registers both classes.

Shape letters: b sequences, q queries, k keys, n heads, d head size, h width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel, T5Config
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from megatron_metro.model.buckets import metro_buckets

_FIRST_POSITION_ROW = 2  # row 1 is that of padding, row 0 is unused
_IGNORED_LABEL = -100
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": functional.relu, "gelu": functional.gelu}


class FairseqT5Config(T5Config):
    """T5's settings with METRO's defaults, and a limit of positions."""

    model_type = "fairseq_t5"

    vocab_size: int = 64_518
    d_model: int = 768
    d_ff: int = 3072
    layer_norm_epsilon: float = 1e-5
    max_positions: int = 1024
    initializer_range: float = 0.02  # of what is not loaded
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    bos_token_id: int | None = 0
    decoder_start_token_id: int | None = 2


class FairseqT5Attention(nn.Module):
    """softmax(q k^T / sqrt(d) + bias) v, with biases in all projections; the encoder's own bias table if it has one."""

    def __init__(self, config: FairseqT5Config, layer: int, *, has_table: bool, is_cross: bool) -> None:
        super().__init__()
        self.num_heads, self.layer, self.is_cross, self.dropout = config.num_heads, layer, is_cross, config.dropout_rate
        inner = config.num_heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model)
        self.max_distance = config.relative_attention_max_distance
        if has_table:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, hidden: Tensor, states: Tensor, mask: Tensor | None, cache: EncoderDecoderCache | None) -> Tensor:
        """[b, q, h] queries' and [b, k, h] keys' states to [b, q, h]; `mask` is added to scores [b, n, q, k]."""
        query = self._split(self.q(hidden))
        key, value = self._project(states, cache)
        if hasattr(self, "relative_attention_bias"):
            bias = self._bias(hidden.shape[1], hidden.device)
            mask = bias if mask is None else mask + bias
        dropout = self.dropout if self.training else 0.0
        context = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.o(context.transpose(1, 2).flatten(2))

    def _project(self, states: Tensor, cache: EncoderDecoderCache | None) -> tuple[Tensor, Tensor]:
        """Keys and values [b, n, k, d] of these states and, in self-attention, of all that the cache holds."""
        if cache is None:
            return self._split(self.k(states)), self._split(self.v(states))
        side = cache.cross_attention_cache if self.is_cross else cache.self_attention_cache
        if self.is_cross and cache.is_updated.get(self.layer):
            kept: Any = side.layers[self.layer]
            return kept.keys, kept.values
        if self.is_cross:
            cache.is_updated[self.layer] = True
        key, value = side.update(self._split(self.k(states)), self._split(self.v(states)), self.layer)
        return key, value

    def _split(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _bias(self, length: int, device: torch.device) -> Tensor:
        """[1, n, length, length]."""
        places = torch.arange(length)
        table = self.relative_attention_bias
        buckets = metro_buckets(places[None, :] - places[:, None], table.num_embeddings, self.max_distance)
        bias: Tensor = table(buckets.to(device)).permute(2, 0, 1)[None]
        return bias


class FairseqT5FeedForward(nn.Module):
    """Two linear layers."""

    def __init__(self, config: FairseqT5Config) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(config.d_model, config.d_ff), nn.Linear(config.d_ff, config.d_model)
        self.activation = _ACTIVATIONS[config.feed_forward_proj]

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., h] to [..., h]."""
        output: Tensor = self.wo(self.activation(self.wi(hidden)))
        return output


class FairseqT5Sublayer(nn.Module):
    """A sublayer under the name that released files give it, and the norm after its residual sum."""

    def __init__(self, config: FairseqT5Config, name: str, module: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, module)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = config.dropout_rate

    def forward(self, hidden: Tensor, *inputs: Any) -> Tensor:
        """[b, q, h] to [b, q, h]."""
        output = functional.dropout(getattr(self, self.name)(hidden, *inputs), self.dropout, self.training)
        normed: Tensor = self.layer_norm(hidden + output)
        return normed


class FairseqT5Block(nn.Module):
    """Self-attention, cross-attention in a decoder, feed-forward."""

    def __init__(self, config: FairseqT5Config, layer: int, *, is_decoder: bool) -> None:
        super().__init__()
        attention = FairseqT5Attention(config, layer, has_table=not is_decoder, is_cross=False)
        parts: dict[str, nn.Module] = {"SelfAttention": attention}
        if is_decoder:
            parts["EncDecAttention"] = FairseqT5Attention(config, layer, has_table=False, is_cross=True)
        parts["DenseReluDense"] = FairseqT5FeedForward(config)
        self.layer = nn.ModuleList(FairseqT5Sublayer(config, name, part) for name, part in parts.items())

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        memory: Tensor | None,
        memory_mask: Tensor | None,
        cache: EncoderDecoderCache | None,
    ) -> Tensor:
        """[b, q, h] to [b, q, h]; a decoder reads `memory` [b, k, h] too. Masks are added to scores [b, n, q, k]."""
        first, *middle, last = self.layer
        hidden = first(hidden, hidden, mask, cache)
        for sublayer in middle:
            hidden = sublayer(hidden, memory, memory_mask, cache)
        output: Tensor = last(hidden)
        return output


class FairseqT5PreTrainedModel(PreTrainedModel):
    """What transformers asks of every model."""

    config_class = FairseqT5Config
    base_model_prefix = "transformer"
    _no_split_modules = ["FairseqT5Block"]  # noqa: RUF012 (transformers' own convention)


class FairseqT5Stack(FairseqT5PreTrainedModel):
    """Encoder or decoder: tokens to hidden states."""

    def __init__(self, config: FairseqT5Config, *, is_decoder: bool) -> None:
        super().__init__(config)
        self.is_decoder = is_decoder
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.pos_embed = nn.Embedding(config.max_positions + _FIRST_POSITION_ROW, config.d_model)
        self.first_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        depth = config.num_decoder_layers if is_decoder else config.num_layers
        assert depth is not None, "T5Config fills it in"
        self.block = nn.ModuleList(FairseqT5Block(config, layer, is_decoder=is_decoder) for layer in range(depth))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """Ids [b, q] to hidden states [b, q, h]; masks [b, k] are 1 where a position may be read."""
        length = input_ids.shape[1]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        rows = self._list_rows(input_ids, attention_mask, past)
        hidden = self.first_layer_norm(self.embed_tokens(input_ids) + self.pos_embed(rows))
        hidden = functional.dropout(hidden, self.config.dropout_rate, self.training)
        mask, source_mask = (_bar_keys(found, hidden.dtype) for found in (attention_mask, encoder_attention_mask))
        if self.is_decoder:
            future = _bar_future(length, past, hidden)
            mask = future if mask is None else mask + future
        for block in self.block:
            hidden = block(hidden, mask, encoder_hidden_states, source_mask, past_key_values)
        return BaseModelOutput(last_hidden_state=hidden)

    def _list_rows(self, ids: Tensor, mask: Tensor | None, past: int) -> Tensor:
        """Rows of the position table: real positions are counted, so that padding on the left moves nothing."""
        if self.is_decoder and mask is None:
            return torch.arange(past, past + ids.shape[1], device=ids.device)[None] + _FIRST_POSITION_ROW
        is_real = mask.bool() if self.is_decoder and mask is not None else ids != self.config.pad_token_id
        rows = torch.where(is_real, is_real.long().cumsum(1) + _FIRST_POSITION_ROW - 1, _FIRST_POSITION_ROW - 1)
        return rows[:, -ids.shape[1] :]


def _bar_keys(is_read: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask [b, k] to what is added to scores [b, n, q, k]."""
    if is_read is None:
        return None
    barred = torch.zeros(is_read.shape, dtype=dtype, device=is_read.device)
    return barred.masked_fill(~is_read.bool(), torch.finfo(dtype).min)[:, None, None, :]


def _bar_future(length: int, past: int, like: Tensor) -> Tensor:
    """What is added to scores [b, n, q, k] of `length` queries after `past` positions."""
    lowest = torch.finfo(like.dtype).min
    barred = torch.full((length, past + length), lowest, dtype=like.dtype, device=like.device)
    return barred.triu(past + 1)[None, None]


class FairseqT5ForConditionalGeneration(FairseqT5PreTrainedModel, GenerationMixin):
    """METRO's main model with its LM head, the token matrix."""

    _tied_weights_keys = {  # noqa: RUF012 (transformers' own convention)
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    }

    def __init__(self, config: FairseqT5Config) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = FairseqT5Stack(config, is_decoder=False)
        self.decoder = FairseqT5Stack(config, is_decoder=True)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token matrix."""
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Another token matrix, for both stacks."""
        assert isinstance(value, nn.Embedding)
        self.shared = self.encoder.embed_tokens = self.decoder.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> Seq2SeqLMOutput:
        """Logits [b, t, vocabulary], and the mean loss over `labels` [b, t] that are not -100.

        As in the released class nothing is padding to the encoder without an `attention_mask`.
        """
        if encoder_outputs is None:
            assert input_ids is not None, "there is nothing to encode"
            encoder_outputs = self.encoder(input_ids, attention_mask)
        if decoder_input_ids is None:
            assert labels is not None, "there is nothing to decode"
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if use_cache and (past_key_values is None or self._is_too_shallow(past_key_values)):
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        memory: Tensor = encoder_outputs[0]
        decoded = self.decoder(decoder_input_ids, decoder_attention_mask, memory, attention_mask, past_key_values)
        logits = self.lm_head(decoded.last_hidden_state)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED_LABEL)
        return Seq2SeqLMOutput(
            loss=loss, logits=logits, past_key_values=past_key_values, encoder_last_hidden_state=memory
        )

    def _is_too_shallow(self, cache: EncoderDecoderCache) -> bool:
        """Whether transformers made a fresh cache of as many layers as the encoder has, where the decoder has more."""
        layers = cache.self_attention_cache.layers
        return cache.get_seq_length() == 0 and 0 < len(layers) < self.config.num_decoder_layers

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """What the decoder reads for targets [b, t]: its start token, then all but the last of them."""
        start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == _IGNORED_LABEL, self.config.pad_token_id)
