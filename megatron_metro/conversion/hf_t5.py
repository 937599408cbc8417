"""Hugging Face's T5, v1.0 and v1.1: configuration, names of weights, tokenizer files.

v1.0 ties its LM head to the token matrix and scales what the head reads; v1.1 does neither. `tie_word_embeddings` means
both. transformers 5 writes it as true whatever the model is and keeps the scale in `scale_decoder_outputs`; whether the
head is tied then shows in the weights alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_metro.config.errors import ConfigError
from megatron_metro.config.presets import PRESETS
from megatron_metro.config.schema import ModelConfig, RunConfig
from megatron_metro.conversion.foreign import Fields, Foreign, require_settings
from megatron_metro.conversion.mapping import Heads, Rows, Rule, copies
from megatron_metro.conversion.weights import TensorFile

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gated-gelu": "gated-gelu"}
# Older files hold a table that T5 never reads.
IGNORED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
_EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_EVERY_T5: Mapping[str, Any] = {
    "norm_placement": "pre",
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "softmax_scale": 1.0,
    "position_embedding_type": "none",
    "relative_attention": "per_stack",
    "relative_attention_decoder": True,
    "relative_attention_bucket": "t5",
    "lm_head": "linear",
}


def read_run(fields: Fields, tensors: TensorFile) -> RunConfig:
    """The run that a T5's config.json and tensors describe; raises CheckpointError."""
    preset = PRESETS["t5-base"]()
    is_tied_in_name = fields.boolean("tie_word_embeddings", True)
    scales = fields.boolean("scale_decoder_outputs", is_tied_in_name)
    layers, dropout = fields.count("num_layers"), fields.number("dropout_rate", 0.1)
    model = replace(
        preset.model,
        vocab_size=fields.count("vocab_size"),
        hidden_size=fields.count("d_model"),
        kv_channels=fields.count("d_kv"),
        ffn_hidden_size=fields.count("d_ff"),
        num_attention_heads=fields.count("num_heads"),
        encoder_num_layers=layers,
        decoder_num_layers=fields.count("num_decoder_layers", layers),
        relative_attention_num_buckets=fields.count("relative_attention_num_buckets", 32),
        relative_attention_max_distance=fields.count("relative_attention_max_distance", 128),
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-6),
        activation=fields.choice("feed_forward_proj", _ACTIVATIONS, "relu"),
        hidden_dropout=dropout,
        attention_dropout=dropout,
        scale_lm_output=scales,
        untie_embeddings_and_output_weights=not is_tied_in_name or _has_own_head(tensors),
    )
    return replace(preset, model=model)


def _has_own_head(tensors: TensorFile) -> bool:
    """Whether the LM head is another matrix than the one that embeds."""
    names = set(tensors.names())
    words = next((name for name in ("shared.weight", *_EMBEDDINGS) if name in names), None)
    if words is None or "lm_head.weight" not in names or tensors.shape(words) != tensors.shape("lm_head.weight"):
        return False
    return not bool((tensors.read(words) == tensors.read("lm_head.weight")).all())


def name_weights(model: ModelConfig) -> list[Rule]:
    """Our weights of encoder, decoder and vocabulary as a T5's."""
    is_tied = not model.untie_embeddings_and_output_weights
    tied = (*_EMBEDDINGS, "lm_head.weight") if is_tied else _EMBEDDINGS
    rules = [Rule(ours="word_embeddings.weight", theirs=("shared.weight",), copies=tied)]
    if not is_tied:
        rules += copies({"lm_head.weight": "lm_head.weight"})
    for network, depth in (("encoder", model.encoder_num_layers), ("decoder", model.decoder_num_layers)):
        first = f"{network}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rules += copies(
            {
                f"{network}.relative_bias.weight": first,
                f"{network}.final_norm.weight": f"{network}.final_layer_norm.weight",
            }
        )
        for i in range(depth):
            rules += name_layer(model, f"{network}.layers.{i}", f"{network}.block.{i}.layer", ("weight",))
    return rules


def name_layer(model: ModelConfig, ours: str, theirs: str, kinds: tuple[str, ...]) -> list[Rule]:
    """A layer in T5's names, with weights alone or, as METRO's release names its layers, with biases."""
    is_decoder = ours.startswith("decoder")
    attention, dense = f"{theirs}.0.SelfAttention", f"{theirs}.{2 if is_decoder else 1}.DenseReluDense"
    rules = []
    for kind in kinds:
        qkv = tuple(f"{attention}.{part}.{kind}" for part in "qkv")
        rules.append(
            Rule(ours=f"{ours}.self_attention.linear_qkv.{kind}", theirs=qkv, transform=Heads(3, model.head_size))
        )
        same = {
            "self_attention.linear_proj": f"{attention}.o",
            "self_attention_norm": f"{theirs}.0.layer_norm",
            "mlp.linear_fc2": f"{dense}.wo",
            "mlp_norm": f"{dense.removesuffix('DenseReluDense')}layer_norm",
        }
        if is_decoder:
            cross = f"{theirs}.1.EncDecAttention"
            same |= {"cross_attention.linear_q": f"{cross}.q", "cross_attention.linear_proj": f"{cross}.o"}
            same["cross_attention_norm"] = f"{theirs}.1.layer_norm"
            kv = tuple(f"{cross}.{part}.{kind}" for part in "kv")
            rules.append(
                Rule(ours=f"{ours}.cross_attention.linear_kv.{kind}", theirs=kv, transform=Heads(2, model.head_size))
            )
        if model.activation == "gated-gelu":
            gates = tuple(f"{dense}.wi_{j}.{kind}" for j in range(2))
            rules.append(Rule(ours=f"{ours}.mlp.linear_fc1.{kind}", theirs=gates, transform=Rows(2)))
        else:
            same["mlp.linear_fc1"] = f"{dense}.wi"
        rules += copies({f"{ours}.{name}.{kind}": f"{other}.{kind}" for name, other in same.items()})
    return rules


def write_config(run: RunConfig) -> dict[str, Any]:
    """config.json of a T5; raises ConfigError where the model is none that transformers has."""
    model = run.model
    require_settings(model, _EVERY_T5, "hf-t5")
    if model.scale_lm_output == model.untie_embeddings_and_output_weights:
        raise ConfigError(
            "--to hf-t5: a T5 either ties its LM head and scales what it reads, or neither; found "
            f"--untie-embeddings-and-output-weights {model.untie_embeddings_and_output_weights} and --scale-lm-output "
            f"{model.scale_lm_output}; export such a model to no other program"
        )
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": model.vocab_size,
        "d_model": model.hidden_size,
        "d_kv": model.head_size,
        "d_ff": model.ffn_hidden_size,
        "num_layers": model.encoder_num_layers,
        "num_decoder_layers": model.decoder_num_layers,
        "num_heads": model.num_attention_heads,
        "relative_attention_num_buckets": model.relative_attention_num_buckets,
        "relative_attention_max_distance": model.relative_attention_max_distance,
        "dropout_rate": model.hidden_dropout,
        "layer_norm_epsilon": model.norm_epsilon,
        "feed_forward_proj": model.activation,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "is_encoder_decoder": True,
    }


FORMAT = Foreign(
    name="hf-t5",
    model_type="t5",
    read_run=read_run,
    name_weights=name_weights,
    write_config=write_config,
    ignored=IGNORED,
    has_t5_ids=True,
)
