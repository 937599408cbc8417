"""T5 v1.0 and v1.1 against Hugging Face transformers' T5 with the same random weights: loss and every gradient.

One process and TP2, PP2, TP2 x PP2, in float64.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5LayerNorm

from megatron_metro.config.schema import ModelConfig
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.layouts import Row
from tests.helpers.parity import GLOBAL_BATCH_SIZE, Arrays, Case, Outcome, local_microbatches, run_case, worst_error

Pool = Callable[[int], WorkerPool]
TOLERANCE = 1e-9

V1_0 = {
    "generator_num_layers": 0,
    "rtd_head": "none",
    "norm_placement": "pre",
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "add_bias_linear": False,
    "softmax_scale": 1.0,
    "position_embedding_type": "none",
    "relative_attention": "per_stack",
    "relative_attention_decoder": True,
    "relative_attention_bucket": "t5",
    "scale_lm_output": True,
}
V1_1 = {**V1_0, "activation": "gated-gelu", "untie_embeddings_and_output_weights": True, "scale_lm_output": False}
MODELS: dict[str, dict[str, Any]] = {
    "v1.0": V1_0,
    "v1.1": V1_1,
    "v1.1 tied, unequal depth, odd d_kv": {
        **V1_1,
        "untie_embeddings_and_output_weights": False,
        "scale_lm_output": True,
        "encoder_num_layers": 3,
        "decoder_num_layers": 2,
        "kv_channels": 5,
    },
}
ROWS = [
    Row(spans=True),
    Row(spans=True, tp=2),
    Row(spans=True, tp=2, sp=True),
    Row(spans=True, pp=2),
    Row(spans=True, pp=2, vpp=2),
    Row(spans=True, tp=2, sp=True, pp=2),
]


def hugging_face_gradients(model: ModelConfig, case: Case, weights: Arrays) -> tuple[float, Arrays]:
    """Loss and gradients of transformers' T5 on the global batch, by our names and in our order of rows."""
    config = T5Config(
        vocab_size=tiny.VOCAB_SIZE,
        d_model=model.hidden_size,
        d_kv=model.head_size,
        d_ff=model.ffn_hidden_size,
        num_layers=model.encoder_num_layers,
        num_decoder_layers=model.decoder_num_layers,
        num_heads=model.num_attention_heads,
        relative_attention_num_buckets=model.relative_attention_num_buckets,
        relative_attention_max_distance=model.relative_attention_max_distance,
        dropout_rate=0.0,
        feed_forward_proj=model.activation,
        tie_word_embeddings=not model.untie_embeddings_and_output_weights,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    network = T5ForConditionalGeneration(config).double().eval()
    if model.untie_embeddings_and_output_weights:  # transformers 5 ties v1.1's too and only leaves out the scaling
        network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().clone())
    for module in network.modules():
        if isinstance(module, T5LayerNorm):  # it takes the variance in FP32 whatever the dtype
            module.forward = partial(_exact_norm, module)
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for name, slices in name_map(model).items():
            for theirs, read, _ in slices:
                parameters[theirs].copy_(torch.from_numpy(read(weights[name])))
    batch = local_microbatches(replace(case, micro_batch_size=GLOBAL_BATCH_SIZE), 0, 0, 1)[0]
    output = network(input_ids=batch.encoder_tokens, decoder_input_ids=batch.decoder_tokens, labels=batch.target_ids)
    output.loss.backward()
    gradients = {}
    for name, slices in name_map(model).items():
        gradients[name] = np.zeros_like(weights[name])
        for theirs, _, write in slices:
            write(gradients[name], parameters[theirs].grad.numpy())
    return output.loss.item(), gradients


def _exact_norm(norm: T5LayerNorm, hidden: torch.Tensor) -> torch.Tensor:
    return norm.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


Slice = tuple[str, Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray, np.ndarray], None]]


def name_map(model: ModelConfig) -> dict[str, list[Slice]]:
    """Our weights as slices that are transformers' weights."""
    names: dict[str, list[Slice]] = {"word_embeddings.weight": [_whole("shared.weight")]}
    if model.untie_embeddings_and_output_weights:
        names["lm_head.weight"] = [_whole("lm_head.weight")]
    depths = {"encoder": model.encoder_num_layers, "decoder": model.decoder_num_layers}
    for stack, depth in depths.items():
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names[f"{stack}.relative_bias.weight"] = [_whole(first)]
        names[f"{stack}.final_norm.weight"] = [_whole(f"{stack}.final_layer_norm.weight")]
        for i in range(depth):
            ours, theirs = f"{stack}.layers.{i}", f"{stack}.block.{i}.layer"
            head = model.head_size
            names[f"{ours}.self_attention_norm.weight"] = [_whole(f"{theirs}.0.layer_norm.weight")]
            names[f"{ours}.self_attention.linear_qkv.weight"] = [
                _heads(f"{theirs}.0.SelfAttention.{part}.weight", head, 3, j) for j, part in enumerate("qkv")
            ]
            names[f"{ours}.self_attention.linear_proj.weight"] = [_whole(f"{theirs}.0.SelfAttention.o.weight")]
            last = 1
            if stack == "decoder":
                last = 2
                names[f"{ours}.cross_attention_norm.weight"] = [_whole(f"{theirs}.1.layer_norm.weight")]
                names[f"{ours}.cross_attention.linear_q.weight"] = [_whole(f"{theirs}.1.EncDecAttention.q.weight")]
                names[f"{ours}.cross_attention.linear_kv.weight"] = [
                    _heads(f"{theirs}.1.EncDecAttention.{part}.weight", head, 2, j) for j, part in enumerate("kv")
                ]
                names[f"{ours}.cross_attention.linear_proj.weight"] = [_whole(f"{theirs}.1.EncDecAttention.o.weight")]
            dense = f"{theirs}.{last}.DenseReluDense"
            names[f"{ours}.mlp_norm.weight"] = [_whole(f"{theirs}.{last}.layer_norm.weight")]
            names[f"{ours}.mlp.linear_fc1.weight"] = [_whole(f"{dense}.wi.weight")]
            if model.activation == "gated-gelu":
                rows = model.ffn_hidden_size
                names[f"{ours}.mlp.linear_fc1.weight"] = [
                    _rows(f"{dense}.wi_{j}.weight", slice(j * rows, (j + 1) * rows)) for j in range(2)
                ]
            names[f"{ours}.mlp.linear_fc2.weight"] = [_whole(f"{dense}.wo.weight")]
    return names


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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_t5_equals_transformers(name: str, row: Row, pool: Pool) -> None:
    row = replace(row, model=MODELS[name])
    case = replace(row.case(), num_steps=1)
    found: Outcome = pool(row.world_size).run(run_case, case)[0]
    loss, expected = hugging_face_gradients(case.run.model, case, found.weights)
    assert found.metrics[0]["lm loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert worst_error(found.gradients, expected)[0] <= TOLERANCE
