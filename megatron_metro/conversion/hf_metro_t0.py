"""The released METRO-T0 models, `fairseq_t5`: configuration and names of weights (reference sections 8.1 and 8.2).

The published configuration of the large models says a maximum distance of 128, with which their published scores were
made; they were trained with 256. What the configuration says is taken, and a warning names the other.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_metro.config.errors import ConfigError
from megatron_metro.config.presets import PRESETS
from megatron_metro.config.schema import ModelConfig, RunConfig
from megatron_metro.conversion.foreign import Fields, Foreign, require_settings
from megatron_metro.conversion.hf_t5 import name_layer
from megatron_metro.conversion.mapping import Rule, copies
from megatron_metro.conversion.weights import TensorFile
from megatron_metro.model.weights import FIRST_POSITION_ROW

LOGGER = logging.getLogger(__name__)

LARGE_BUCKETS, TRAINED_DISTANCE, PUBLISHED_DISTANCE = 128, 256, 128
_EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu"}
_EVERY_METRO: Mapping[str, Any] = {
    "norm_placement": "post",
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "softmax_scale": None,
    "position_embedding_type": "learned_absolute",
    "relative_attention": "per_layer",
    "relative_attention_decoder": False,
    "relative_attention_bucket": "metro",
    "untie_embeddings_and_output_weights": False,
    "scale_lm_output": False,
    "lm_head": "linear",
}


def read_run(fields: Fields, tensors: TensorFile) -> RunConfig:
    """The run that a METRO-T0's config.json and position table describe; raises CheckpointError."""
    preset = PRESETS["t5-metro-base"]()  # METRO's architecture without a generator
    fields.require("tie_word_embeddings", True)
    layers, dropout = fields.count("num_layers"), fields.number("dropout_rate", 0.1)
    distance = fields.count("relative_attention_max_distance", PUBLISHED_DISTANCE)
    model = replace(
        preset.model,
        vocab_size=fields.count("vocab_size"),
        hidden_size=fields.count("d_model"),
        kv_channels=fields.count("d_kv"),
        ffn_hidden_size=fields.count("d_ff"),
        num_attention_heads=fields.count("num_heads"),
        encoder_num_layers=layers,
        decoder_num_layers=fields.count("num_decoder_layers", layers),
        max_position_embeddings=_count_positions(fields, tensors),
        relative_attention_num_buckets=fields.count("relative_attention_num_buckets", 32),
        relative_attention_max_distance=distance,
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-6),
        activation=fields.choice("feed_forward_proj", _ACTIVATIONS, "relu"),
        hidden_dropout=dropout,
        attention_dropout=dropout,
    )
    if (model.relative_attention_num_buckets, distance) == (LARGE_BUCKETS, PUBLISHED_DISTANCE):
        LOGGER.warning(
            "%s: says --relative-attention-max-distance %d, as for the published scores; the large models were trained "
            "with %d: give that to go on training",
            *(fields.place, distance, TRAINED_DISTANCE),
        )
    length = min(preset.data.encoder_seq_length, model.max_position_embeddings)
    objective = replace(preset.objective, objective="metro")
    return replace(preset, model=model, objective=objective, data=replace(preset.data, encoder_seq_length=length))


def _count_positions(fields: Fields, tensors: TensorFile) -> int:
    """The released class makes a table of 1026 rows whatever its configuration says, so the table counts."""
    name = "encoder.pos_embed.weight"
    if name in tensors.names() and len(shape := tensors.shape(name)) == 2 and shape[0] > FIRST_POSITION_ROW:
        return shape[0] - FIRST_POSITION_ROW
    return fields.count("max_positions", 1024)


def name_weights(model: ModelConfig) -> list[Rule]:
    """Our weights of encoder, decoder and vocabulary as a METRO-T0's."""
    rules = [Rule(ours="word_embeddings.weight", theirs=("shared.weight",), copies=_EMBEDDINGS)]
    kinds = ("weight", "bias")
    for network, depth in (("encoder", model.encoder_num_layers), ("decoder", model.decoder_num_layers)):
        rules += copies({f"{network}.position_embeddings.weight": f"{network}.pos_embed.weight"})
        rules += copies({f"{network}.embedding_norm.{kind}": f"{network}.first_layer_norm.{kind}" for kind in kinds})
        for i in range(depth):
            ours, theirs = f"{network}.layers.{i}", f"{network}.block.{i}.layer"
            rules += name_layer(model, ours, theirs, kinds)
            if network == "encoder":
                table = f"{theirs}.0.SelfAttention.relative_attention_bias.weight"
                rules += copies({f"{ours}.relative_bias.weight": table})
    return rules


def write_config(run: RunConfig) -> dict[str, Any]:
    """config.json of a METRO-T0; raises ConfigError where the model is none."""
    model = run.model
    require_settings(model, _EVERY_METRO, "hf-metro-t0")
    if model.activation not in _ACTIVATIONS:
        raise ConfigError(f"--to hf-metro-t0: its models have --activation relu or gelu, found {model.activation}")
    return {
        "architectures": ["FairseqT5ForConditionalGeneration"],
        "model_type": "fairseq_t5",
        "vocab_size": model.vocab_size,
        "d_model": model.hidden_size,
        "d_kv": model.head_size,
        "d_ff": model.ffn_hidden_size,
        "num_layers": model.encoder_num_layers,
        "num_decoder_layers": model.decoder_num_layers,
        "num_heads": model.num_attention_heads,
        "relative_attention_num_buckets": model.relative_attention_num_buckets,
        "relative_attention_max_distance": model.relative_attention_max_distance,
        "max_positions": model.max_position_embeddings,
        "dropout_rate": model.hidden_dropout,
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_factor": 1.0,
        "feed_forward_proj": model.activation,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
    }


FORMAT = Foreign(
    name="hf-metro-t0",
    model_type="fairseq_t5",
    read_run=read_run,
    name_weights=name_weights,
    write_config=write_config,
)
