"""The main model against Hugging Face's BART, which METRO's Post-LN layers, norms and positions are those of.

A second oracle, written by other people: with zero relative-bias tables the two networks are one. BART gets METRO's
weights under its own names, METRO's gradients are renamed likewise, and both are compared.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import BartConfig, BartForConditionalGeneration

from megatron_metro.batch import Microbatch
from megatron_metro.config.chain import build_chain
from megatron_metro.config.schema import ModelConfig
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.parallel.layout import single_piece
from megatron_metro.training.engine import Engine
from tests.helpers import tiny
from tests.helpers.parity import perturb

MODEL = tiny.tiny_model(generator_num_layers=0, encoder_num_layers=3, decoder_num_layers=2)
NORMS = {"self_attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}
START_ID = 2


def build_bart(engine: Engine, dtype: torch.dtype) -> BartForConditionalGeneration:
    """BART with the engine's weights."""
    model = engine.run.model
    config = BartConfig(
        vocab_size=model.vocab_size, d_model=model.hidden_size,
        encoder_layers=model.encoder_num_layers, decoder_layers=model.decoder_num_layers,
        encoder_attention_heads=model.num_attention_heads, decoder_attention_heads=model.num_attention_heads,
        encoder_ffn_dim=model.ffn_hidden_size, decoder_ffn_dim=model.ffn_hidden_size,
        max_position_embeddings=model.max_position_embeddings, activation_function="relu", scale_embedding=False,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, pad_token_id=tiny.PAD_ID, use_cache=False,
        attn_implementation="eager",
    )  # fmt: skip
    bart = BartForConditionalGeneration(config).to(dtype).train()
    weights = {name: parameter.detach() for name, parameter in engine.pieces[0].named_parameters()}
    left = bart.load_state_dict(rename_for_bart(weights, model), strict=False)
    tied = {"lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"}
    assert set(left.missing_keys) <= tied | {"final_logits_bias"} and left.unexpected_keys == []
    assert not bart.final_logits_bias.any()
    return bart


def rename_for_bart(tensors: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """METRO's tensors by the names and in the shapes of BART's weights; tied ones once."""
    renamed = {"model.shared.weight": tensors["word_embeddings.weight"][: model.vocab_size]}
    for network, depth in (("encoder", model.encoder_num_layers), ("decoder", model.decoder_num_layers)):
        renamed[f"model.{network}.embed_positions.weight"] = tensors[f"{network}.position_embeddings.weight"]
        for kind in ("weight", "bias"):
            renamed[f"model.{network}.layernorm_embedding.{kind}"] = tensors[f"{network}.embedding_norm.{kind}"]
            for layer in range(depth):
                ours, theirs = f"{network}.layers.{layer}", f"model.{network}.layers.{layer}"
                renamed |= rename_layer(tensors, (ours, theirs), kind, model.head_size)
    return renamed


def rename_layer(tensors: dict[str, Tensor], prefixes: tuple[str, str], kind: str, head_size: int) -> dict[str, Tensor]:
    """All weights, or all biases, of a layer."""
    ours, theirs = prefixes
    is_decoder = f"{ours}.cross_attention.linear_q.weight" in tensors
    norms = NORMS | ({"cross_attention_norm": "encoder_attn_layer_norm"} if is_decoder else {})
    renamed = {f"{theirs}.{name}.{kind}": tensors[f"{ours}.{norm}.{kind}"] for norm, name in norms.items()}
    for linear in ("fc1", "fc2"):
        renamed[f"{theirs}.{linear}.{kind}"] = tensors[f"{ours}.mlp.linear_{linear}.{kind}"]
    fused = [("self_attention", "linear_qkv", "self_attn", "qkv")]
    if is_decoder:
        fused += [("cross_attention", "linear_q", "encoder_attn", "q")]
        fused += [("cross_attention", "linear_kv", "encoder_attn", "kv")]
    for attention, linear, name, parts in fused:
        # Rows are ordered by head: its queries, its keys, its values.
        by_head = tensors[f"{ours}.{attention}.{linear}.{kind}"].unflatten(0, (-1, len(parts), head_size))
        for part, rows in zip(parts, by_head.unbind(1)):
            renamed[f"{theirs}.{name}.{part}_proj.{kind}"] = rows.flatten(0, 1)
        renamed[f"{theirs}.{name}.out_proj.{kind}"] = tensors[f"{ours}.{attention}.linear_proj.{kind}"]
    return renamed


def build_engine(groups: ParallelGroups, dtype: torch.dtype, *, has_bias: bool = False) -> Engine:
    engine = Engine(tiny.tiny_run(MODEL), single_piece(build_chain(MODEL)), groups, dtype, pad_id=tiny.PAD_ID)
    perturb(engine)
    with torch.no_grad():
        tables = [p for name, p in engine.pieces[0].named_parameters() if "relative_bias" in name]
        assert len(tables) == MODEL.encoder_num_layers
        for table in [] if has_bias else tables:
            table.zero_()
    return engine


def make_batch(*, is_padded: bool) -> Microbatch:
    batch = tiny.span_batch(4, seed=31)
    # BART's embedding gives the padding id no gradient, so no sequence starts with it.
    batch.decoder_tokens[:, 0] = START_ID
    if not is_padded:
        return batch
    padding = torch.arange(tiny.LENGTH) >= torch.tensor([tiny.LENGTH, 9, 12, 5])[:, None]
    return replace(
        batch, encoder_tokens=batch.encoder_tokens.masked_fill(padding, tiny.PAD_ID), encoder_padding=padding
    )


def run_metro(engine: Engine, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor], float]:
    """Logits [b, t, v], gradients under BART's names, and the loss."""
    kept: list[Tensor] = []

    def keep(module: torch.nn.Module, arguments: tuple, options: dict, output: Tensor) -> None:
        if options.get("project"):
            kept.append(output.detach()[:, : MODEL.vocab_size])

    handle = engine.pieces[0].word_embeddings.register_forward_hook(keep, with_kwargs=True)
    log = engine.accumulate_gradients([batch])
    handle.remove()
    gradients = {name: parameter.main_grad for name, parameter in engine.pieces[0].named_parameters()}
    return kept[0].view(*batch.target_ids.shape, -1), rename_for_bart(gradients, MODEL), log["lm loss"]


def run_bart(bart: BartForConditionalGeneration, batch: Microbatch) -> Tensor:
    """Logits [b, t, v]."""
    mask = None if batch.encoder_padding is None else (~batch.encoder_padding).long()
    return bart(
        input_ids=batch.encoder_tokens, attention_mask=mask, decoder_input_ids=batch.decoder_tokens, use_cache=False
    ).logits


@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
def test_the_main_model_is_bart(groups: ParallelGroups, dtype: torch.dtype, tolerance: float, is_padded: bool) -> None:
    engine, batch = build_engine(groups, dtype), make_batch(is_padded=is_padded)
    logits, gradients, loss = run_metro(engine, batch)
    bart = build_bart(engine, dtype)
    expected = run_bart(bart, batch)
    expected_loss = functional.cross_entropy(expected.flatten(0, 1), batch.target_ids.flatten())
    expected_loss.backward()
    assert float(logits.std()) > 0.1  # nothing is compared with zeros
    torch.testing.assert_close(logits, expected.detach(), rtol=0.0, atol=tolerance)
    assert loss == pytest.approx(expected_loss.item(), abs=tolerance)
    named = dict(bart.named_parameters())
    assert named.keys() == gradients.keys()
    largest = max(float(parameter.grad.abs().max()) for parameter in named.values())
    for name, parameter in named.items():
        scale = max(float(parameter.grad.abs().max()), 1e-3 * largest)
        error = float((gradients[name] - parameter.grad).abs().max()) / scale
        assert error <= 10 * tolerance, f"{name}: {error:.1e}"


def test_a_bias_makes_the_difference(groups: ParallelGroups) -> None:
    engine, batch = build_engine(groups, torch.float64, has_bias=True), make_batch(is_padded=False)
    logits, _, _ = run_metro(engine, batch)
    expected = run_bart(build_bart(engine, torch.float64), batch).detach()
    assert float((logits - expected).abs().max()) > 1e-3
