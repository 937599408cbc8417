"""transformers' T5 with the weights of one of ours: its configuration, names of weights, gradients by our names.

Our fused weights are slices of theirs: a name maps to the parts it is put together from.
"""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5LayerNorm

from megatron_metro.config.chain import Network
from megatron_metro.config.network_sizes import network_sizes
from megatron_metro.config.schema import ModelConfig
from tests.helpers.parity import Arrays

# Their name, and how to read the slice of our array and how to write it.
Slice = tuple[str, Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray, np.ndarray], None]]
Names = dict[str, list[Slice]]


def t5_config(model: ModelConfig, network: Network = "encoder") -> T5Config:
    """Their configuration of the main model, or with a network of its own sizes as its encoder."""
    sizes = network_sizes(model, network)
    return T5Config(
        vocab_size=model.vocab_size,
        d_model=sizes.hidden_size,
        d_kv=sizes.head_size,
        d_ff=sizes.ffn_hidden_size,
        num_layers=model.generator_num_layers if network == "generator" else model.encoder_num_layers,
        num_decoder_layers=model.decoder_num_layers,
        num_heads=sizes.num_attention_heads,
        relative_attention_num_buckets=model.relative_attention_num_buckets,
        relative_attention_max_distance=model.relative_attention_max_distance,
        dropout_rate=0.0,
        feed_forward_proj=model.activation,
        tie_word_embeddings=not model.untie_embeddings_and_output_weights,
        decoder_start_token_id=0,
        pad_token_id=0,
    )


def make_exact(network: nn.Module) -> None:
    """Let their norms run in the dtype of the model: they take the variance in FP32 whatever it is."""
    for module in network.modules():
        if isinstance(module, T5LayerNorm):
            module.forward = partial(_exact_norm, module)


def _exact_norm(norm: T5LayerNorm, hidden: torch.Tensor) -> torch.Tensor:
    return norm.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


@torch.no_grad()
def fill(network: nn.Module, names: Names, weights: Arrays) -> None:
    """Give their network our weights."""
    parameters = dict(network.named_parameters())
    for name, slices in names.items():
        for theirs, read, _ in slices:
            parameters[theirs].copy_(torch.from_numpy(read(weights[name])))


def read_gradients(network: nn.Module, names: Names, weights: Arrays) -> Arrays:
    """Their gradients by our names, in our order of rows."""
    parameters: Mapping[str, nn.Parameter] = dict(network.named_parameters())
    gradients: Arrays = {}
    for name, slices in names.items():
        gradients[name] = np.zeros_like(weights[name])
        for theirs, _, write in slices:
            gradient = parameters[theirs].grad
            assert gradient is not None, theirs
            write(gradients[name], gradient.numpy())
    return gradients


def name_main_model(model: ModelConfig) -> Names:
    """Our weights of encoder, decoder and vocabulary as slices that are theirs."""
    names: Names = {"word_embeddings.weight": [_whole("shared.weight")]}
    if model.untie_embeddings_and_output_weights:
        names["lm_head.weight"] = [_whole("lm_head.weight")]
    return names | name_stack(model, "encoder", "encoder") | name_stack(model, "decoder", "decoder")


def name_stack(model: ModelConfig, network: Network, theirs: str) -> Names:
    """Our weights of one network's stack as slices of those of their stack."""
    first = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    names: Names = {
        f"{network}.relative_bias.weight": [_whole(first)],
        f"{network}.final_norm.weight": [_whole(f"{theirs}.final_layer_norm.weight")],
    }
    depths = {
        "generator": model.generator_num_layers,
        "encoder": model.encoder_num_layers,
        "decoder": model.decoder_num_layers,
    }
    for i in range(depths[network]):
        names |= _name_layer(model, network, f"{network}.layers.{i}", f"{theirs}.block.{i}.layer")
    return names


def _name_layer(model: ModelConfig, network: Network, ours: str, theirs: str) -> Names:
    sizes = network_sizes(model, network)
    self_attention, cross_attention = f"{theirs}.0.SelfAttention", f"{theirs}.1.EncDecAttention"
    names: Names = {
        f"{ours}.self_attention_norm.weight": [_whole(f"{theirs}.0.layer_norm.weight")],
        f"{ours}.self_attention.linear_qkv.weight": [
            _heads(f"{self_attention}.{part}.weight", sizes.head_size, 3, j) for j, part in enumerate("qkv")
        ],
        f"{ours}.self_attention.linear_proj.weight": [_whole(f"{self_attention}.o.weight")],
    }
    last = 1
    if network == "decoder":
        last = 2
        names |= {
            f"{ours}.cross_attention_norm.weight": [_whole(f"{theirs}.1.layer_norm.weight")],
            f"{ours}.cross_attention.linear_q.weight": [_whole(f"{cross_attention}.q.weight")],
            f"{ours}.cross_attention.linear_kv.weight": [
                _heads(f"{cross_attention}.{part}.weight", sizes.head_size, 2, j) for j, part in enumerate("kv")
            ],
            f"{ours}.cross_attention.linear_proj.weight": [_whole(f"{cross_attention}.o.weight")],
        }
    dense, rows = f"{theirs}.{last}.DenseReluDense", sizes.ffn_hidden_size
    first = [_whole(f"{dense}.wi.weight")]
    if model.activation == "gated-gelu":
        first = [_rows(f"{dense}.wi_{j}.weight", slice(j * rows, (j + 1) * rows)) for j in range(2)]
    return names | {
        f"{ours}.mlp_norm.weight": [_whole(f"{theirs}.{last}.layer_norm.weight")],
        f"{ours}.mlp.linear_fc1.weight": first,
        f"{ours}.mlp.linear_fc2.weight": [_whole(f"{dense}.wo.weight")],
    }


def _whole(name: str) -> Slice:
    return _rows(name, slice(None))


def _rows(name: str, rows: slice) -> Slice:
    def write(target: np.ndarray, values: np.ndarray) -> None:
        target[rows] = values

    return name, lambda array: array[rows], write


def _heads(name: str, head: int, parts: int, part: int) -> Slice:
    """One of the parts that a fused projection interleaves by head."""

    def view(array: np.ndarray) -> np.ndarray:
        return array.reshape(-1, parts, head, array.shape[-1])[:, part]

    def write(target: np.ndarray, values: np.ndarray) -> None:
        view(target)[...] = values.reshape(-1, head, values.shape[-1])

    return name, lambda array: view(array).reshape(-1, array.shape[-1]), write
