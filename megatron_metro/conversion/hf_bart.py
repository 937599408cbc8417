"""Hugging Face's BART: METRO's main model without bias tables is exactly this architecture."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_metro.config.errors import CheckpointError, ConfigError
from megatron_metro.config.presets import PRESETS
from megatron_metro.config.schema import ModelConfig, RunConfig
from megatron_metro.conversion.foreign import Fields, Foreign, require_settings
from megatron_metro.conversion.mapping import Heads, Rule, copies
from megatron_metro.conversion.weights import TensorFile

LOGITS_BIAS = "final_logits_bias"  # a buffer of zeros that no training changes
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu"}
_EVERY_BART: Mapping[str, Any] = {
    "norm_placement": "post",
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-5,
    "add_bias_linear": True,
    "softmax_scale": None,
    "position_embedding_type": "learned_absolute",
    "relative_attention": "none",
    "untie_embeddings_and_output_weights": False,
    "scale_lm_output": False,
    "lm_head": "linear",
}


def read_run(fields: Fields, tensors: TensorFile) -> RunConfig:
    """The run that a BART's config.json describes; raises CheckpointError."""
    preset = PRESETS["t5-metro-base"]()  # METRO's architecture without a generator
    for name in ("ffn_dim", "attention_heads"):
        fields.require(f"decoder_{name}", fields.count(f"encoder_{name}"))
    for name, value in (("scale_embedding", False), ("activation_dropout", 0.0), ("tie_word_embeddings", True)):
        fields.require(name, value)
    _check_logits_bias(fields, tensors)
    positions = fields.count("max_position_embeddings", 1024)
    model = replace(
        preset.model,
        vocab_size=fields.count("vocab_size"),
        hidden_size=fields.count("d_model"),
        ffn_hidden_size=fields.count("encoder_ffn_dim"),
        num_attention_heads=fields.count("encoder_attention_heads"),
        encoder_num_layers=fields.count("encoder_layers"),
        decoder_num_layers=fields.count("decoder_layers"),
        max_position_embeddings=positions,
        relative_attention="none",
        activation=fields.choice("activation_function", _ACTIVATIONS, "gelu"),
        hidden_dropout=fields.number("dropout", 0.1),
        attention_dropout=fields.number("attention_dropout", 0.0),
    )
    length = min(preset.data.encoder_seq_length, positions)
    objective = replace(preset.objective, objective="metro")
    return replace(preset, model=model, objective=objective, data=replace(preset.data, encoder_seq_length=length))


def _check_logits_bias(fields: Fields, tensors: TensorFile) -> None:
    if LOGITS_BIAS in tensors.names() and bool(tensors.read(LOGITS_BIAS).any()):
        raise CheckpointError(f"{fields.place.parent}: {LOGITS_BIAS} is not zero, which this program has no place for")


def name_weights(model: ModelConfig) -> list[Rule]:
    """Our weights of encoder, decoder and vocabulary as a BART's."""
    tied = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
    rules = [Rule(ours="word_embeddings.weight", theirs=("model.shared.weight",), copies=tied)]
    for network, depth in (("encoder", model.encoder_num_layers), ("decoder", model.decoder_num_layers)):
        rules += copies(
            {
                f"{network}.position_embeddings.weight": f"model.{network}.embed_positions.weight",
                f"{network}.embedding_norm.weight": f"model.{network}.layernorm_embedding.weight",
                f"{network}.embedding_norm.bias": f"model.{network}.layernorm_embedding.bias",
            }
        )
        for i in range(depth):
            rules += name_layer(model.head_size, f"{network}.layers.{i}", f"model.{network}.layers.{i}")
    return rules


def name_layer(head_size: int, ours: str, theirs: str) -> list[Rule]:
    """A layer in the names of fairseq, which BART keeps."""
    is_decoder = ours.startswith("decoder")
    fused = [("self_attention.linear_qkv", "self_attn", "qkv")]
    same = {
        "self_attention.linear_proj": "self_attn.out_proj",
        "self_attention_norm": "self_attn_layer_norm",
        "mlp.linear_fc1": "fc1",
        "mlp.linear_fc2": "fc2",
        "mlp_norm": "final_layer_norm",
    }
    if is_decoder:
        fused.append(("cross_attention.linear_kv", "encoder_attn", "kv"))
        same["cross_attention.linear_q"] = "encoder_attn.q_proj"
        same["cross_attention.linear_proj"] = "encoder_attn.out_proj"
        same["cross_attention_norm"] = "encoder_attn_layer_norm"
    rules = []
    for kind in ("weight", "bias"):
        for name, attention, parts in fused:
            names = tuple(f"{theirs}.{attention}.{part}_proj.{kind}" for part in parts)
            rules.append(Rule(ours=f"{ours}.{name}.{kind}", theirs=names, transform=Heads(len(parts), head_size)))
        rules += copies({f"{ours}.{name}.{kind}": f"{theirs}.{other}.{kind}" for name, other in same.items()})
    return rules


def write_config(run: RunConfig) -> dict[str, Any]:
    """config.json of a BART; raises ConfigError where the model is none."""
    model = run.model
    require_settings(model, _EVERY_BART, "hf-bart")
    if model.activation not in _ACTIVATIONS or model.head_size * model.num_attention_heads != model.hidden_size:
        raise ConfigError(
            f"--to hf-bart: found --activation {model.activation}, --num-attention-heads {model.num_attention_heads} "
            f"and --kv-channels {model.head_size}; a BART has relu or gelu, and heads as wide as --hidden-size together"
        )
    sides = {
        "layers": (model.encoder_num_layers, model.decoder_num_layers),
        "ffn_dim": (model.ffn_hidden_size,) * 2,
        "attention_heads": (model.num_attention_heads,) * 2,
    }
    return {
        "architectures": ["BartForConditionalGeneration"],
        "model_type": "bart",
        "vocab_size": model.vocab_size,
        "d_model": model.hidden_size,
        **{f"encoder_{name}": encoder for name, (encoder, _) in sides.items()},
        **{f"decoder_{name}": decoder for name, (_, decoder) in sides.items()},
        "activation_function": model.activation,
        "max_position_embeddings": model.max_position_embeddings,
        "dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "activation_dropout": 0.0,
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "bos_token_id": 0,
        "forced_eos_token_id": None,
    }


FORMAT = Foreign(
    name="hf-bart",
    model_type="bart",
    read_run=read_run,
    name_weights=name_weights,
    write_config=write_config,
    ignored=(LOGITS_BIAS,),
)
