"""METRO checkpoints as fairseq wrote them, made from weights of our names by the reference's table (section 8.3)."""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from megatron_metro.config.schema import ModelConfig
from megatron_metro.model.weights import weight_shapes

SIZES = {"generator_num_layers": 1, "encoder_num_layers": 3, "decoder_num_layers": 2, "kv_channels": 5}
FUSED = {"q": 0, "k": 1, "v": 2}


def make_weights(model: ModelConfig) -> dict[str, Tensor]:
    """Random weights under our names."""
    return {name: torch.randn(shape) * 0.2 for name, shape in weight_shapes(model).items()}


def name_as_fairseq(model: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's key map, read from right to left."""
    words, found = weights["word_embeddings.weight"], OrderedDict()
    networks = {"encoder": "encoder", "decoder": "decoder", "generator": "generator.sentence_encoder"}
    for ours, theirs in networks.items():
        if ours == "generator" and not model.has_generator:
            continue
        found[f"{theirs}.embed_tokens.weight"] = words
        owner = "encoder" if f"{ours}.embedding_norm.bias" not in weights else ours
        found[f"{theirs}.embed_positions.weight"] = weights[f"{owner}.position_embeddings.weight"]
        for kind in ("weight", "bias"):
            found[f"{theirs}.layernorm_embedding.{kind}"] = weights[f"{owner}.embedding_norm.{kind}"]
            for layer in range(getattr(model, f"{ours}_num_layers")):
                found |= name_layer(weights, f"{ours}.layers.{layer}", f"{theirs}.layers.{layer}", kind)
        for layer in range(getattr(model, f"{ours}_num_layers") if ours != "decoder" else 0):
            table = weights[f"{ours}.layers.{layer}.relative_bias.weight"]
            found[f"{theirs}.layers.{layer}.self_attn_rel_pos.rel_attn_bias.weight"] = table
        if ours != "generator":
            found[f"{theirs}.version"] = torch.tensor([3.0])
    found["decoder.output_projection.weight"] = words
    if model.has_generator:
        found["generator.lm_head.weight"], found["generator.lm_head.bias"] = words, weights["mlm_head.output_bias"]
        for kind in ("weight", "bias"):
            found[f"generator.lm_head.dense.{kind}"] = weights[f"mlm_head.dense.{kind}"]
            found[f"generator.lm_head.layer_norm.{kind}"] = weights[f"mlm_head.norm.{kind}"]
            found[f"rtd_head.{kind}"] = weights[f"rtd_head.output.{kind}"]
            if model.rtd_head == "roberta":
                found[f"rtd_head.dense.{kind}"] = weights[f"rtd_head.dense.{kind}"]
                found[f"rtd_head.layer_norm.{kind}"] = weights[f"rtd_head.norm.{kind}"]
    return found


def name_layer(weights: dict[str, Tensor], ours: str, theirs: str, kind: str) -> dict[str, Tensor]:
    head_size = SIZES["kv_channels"]
    qkv = weights[f"{ours}.self_attention.linear_qkv.{kind}"].unflatten(0, (-1, 3, head_size))
    found = {f"{theirs}.self_attn.{n}_proj.{kind}": qkv[:, i].flatten(0, 1).contiguous() for n, i in FUSED.items()}
    same = {"self_attention.linear_proj": "self_attn.out_proj", "self_attention_norm": "self_attn_layer_norm"}
    same |= {"mlp.linear_fc1": "fc1", "mlp.linear_fc2": "fc2", "mlp_norm": "final_layer_norm"}
    if ours.startswith("decoder"):
        kv = weights[f"{ours}.cross_attention.linear_kv.{kind}"].unflatten(0, (-1, 2, head_size))
        found |= {
            f"{theirs}.encoder_attn.{n}_proj.{kind}": kv[:, i].flatten(0, 1).contiguous() for i, n in enumerate("kv")
        }
        same |= {
            "cross_attention.linear_q": "encoder_attn.q_proj",
            "cross_attention.linear_proj": "encoder_attn.out_proj",
        }
        same["cross_attention_norm"] = "encoder_attn_layer_norm"
    return found | {f"{theirs}.{other}.{kind}": weights[f"{ours}.{name}.{kind}"] for name, other in same.items()}


def save(path: Path, model: ModelConfig, weights: dict[str, Tensor]) -> None:
    """All that fairseq writes beside the model: settings with numbers of every kind, the optimizer's state."""
    state = name_as_fairseq(model, weights)
    torch.save(
        {
            "args": None,
            "cfg": {
                "_name": None,
                "task": {"tokens_per_sample": 512, "shuffle": True, "lr": [0.0004, 1e-6, -3, 2**40]},
            },
            "model": state,
            "criterion": OrderedDict(),
            "optimizer_history": [{"lr_scheduler_state": {"best": None}, "num_updates": 125_000}],
            "last_optimizer_state": {
                "state": {0: {"exp_avg": torch.zeros(3), "step": 7}},
                "param_groups": [{"lr": 0.1}],
            },
            "extra_state": {"train_iterator": {"epoch": 2}, "val_loss": 1.5},
        },
        path,
    )
