"""The model in one process against the plain-PyTorch METRO: losses, sampled tokens, accuracies and every gradient."""

import pytest
import torch

from megatron_metro.config.schema import ObjectiveConfig
from megatron_metro.model import piece as piece_module
from tests.helpers import tiny
from tests.helpers.oracle import check, make_engine, split
from tests.helpers.reference import ReferenceMetro

MODELS: dict[str, dict] = {
    "token": {},
    "token_pos_norm": {"generator_embedding_sharing": "token_pos_norm"},
    "simple_heads": {"rtd_head": "simple", "mlm_head": "linear"},
    "no_rtd": {"rtd_head": "none"},
    "per_stack": {"relative_attention": "per_stack", "relative_attention_decoder": True},
    "no_bias": {"relative_attention": "none"},
    "unequal": {"encoder_num_layers": 3, "decoder_num_layers": 1, "generator_num_layers": 1, "kv_channels": 8},
    "untied": {"untie_embeddings_and_output_weights": True},
    "narrow_generator": {
        "generator_hidden_size": 8,
        "generator_ffn_hidden_size": 12,
        "generator_num_attention_heads": 2,
        "rtd_head": "gelu",
        "rtd_head_hidden_size": 20,
    },
    "narrow_generator_and_linear_head": {
        "generator_hidden_size": 8,
        "generator_embedding_sharing": "token_pos_norm",
        "mlm_head": "linear",
    },
    "wide_generator_and_own_matrix": {
        "generator_hidden_size": 24,
        "generator_num_attention_heads": 6,
        "untie_mlm_head": True,
        "kv_channels": 5,
    },
    "own_matrix_alone": {"generator_ffn_hidden_size": 40, "untie_mlm_head": True, "mlm_head": "linear"},
}
# fmt: on


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_equal_the_oracle(groups, name, padded):
    objective = ObjectiveConfig(weighted_lm_loss=name == "simple_heads")
    engine = make_engine(groups, tiny.tiny_model(**MODELS[name]), objective)
    check(engine, split(tiny.metro_batch(6, seed=21, padded=padded), 2), objective)


def test_the_main_model_alone_on_span_batches(groups):
    engine = make_engine(groups, tiny.tiny_model(generator_num_layers=0), ObjectiveConfig(objective="t5-span"))
    check(engine, split(tiny.span_batch(4, seed=22), 2), ObjectiveConfig(objective="t5-span"))


def test_sampled_tokens_equal_the_oracle(groups, monkeypatch):
    engine = make_engine(groups, tiny.tiny_model(), ObjectiveConfig())
    microbatches = split(tiny.metro_batch(8, seed=23, padded=True), 2)
    fills: list[torch.Tensor] = []
    fill_slots = piece_module.fill_slots

    def record(tokens, slots, ids):
        corrupted = fill_slots(tokens, slots, ids)
        fills.append(corrupted)
        return corrupted

    monkeypatch.setattr(piece_module, "fill_slots", record)
    engine.accumulate_gradients(microbatches)
    weights = {name: p.detach() for name, p in engine.pieces[0].named_parameters()}
    expected = ReferenceMetro(weights, engine.run.model, pad_id=tiny.PAD_ID).run(microbatches)
    for i, corrupted in enumerate(expected.corrupted):
        assert torch.equal(fills[2 * i], corrupted)  # the sampling unit and the RTD head each rebuild it
        assert not torch.equal(corrupted, microbatches[i].encoder_tokens)
