"""Rows of the messages between pieces."""

from dataclasses import replace

import pytest

from megatron_metro.config.chain import Unit
from megatron_metro.config.payload import payload_rows
from megatron_metro.config.schema import ModelConfig

METRO = ModelConfig(vocab_size=33_280)
LENGTHS = {"encoder_length": 512, "decoder_length": 256, "num_masked_slots": 80}


@pytest.mark.parametrize(
    ("unit", "parts"),
    [
        (Unit("generator_embedding"), {"hidden": 512}),
        (Unit("generator_layer", 1), {"hidden": 512}),
        (Unit("mlm_head"), {"hidden": 512, "aux": 1}),
        (Unit("encoder_layer", 0), {"hidden": 512, "aux": 1}),
        (Unit("encoder_head"), {"hidden": 512, "aux": 1}),
        (Unit("decoder_embedding"), {"hidden": 256, "encoder_output": 512, "aux": 1}),
        (Unit("decoder_layer", 0), {"hidden": 256, "encoder_output": 512, "aux": 1}),
    ],
)
def test_parts_follow_the_chain(unit, parts):
    rows = payload_rows(unit, METRO, **LENGTHS)
    assert rows.parts == parts
    assert rows.total == sum(parts.values())


def test_digits_per_slot():
    before, after = (payload_rows(Unit(kind), METRO, **LENGTHS) for kind in ("mlm_head", "encoder_head"))
    assert (before.num_id_digits, before.num_weight_digits) == (2, 0)
    assert (after.num_id_digits, after.num_weight_digits) == (2, 4)
    large = payload_rows(Unit("mlm_head"), replace(METRO, vocab_size=65_537), **LENGTHS)
    assert large.num_id_digits == 3
    narrow = replace(METRO, hidden_size=64, num_attention_heads=4)
    assert payload_rows(Unit("mlm_head"), narrow, **LENGTHS).aux == 3  # 160 digits
    assert payload_rows(Unit("decoder_layer", 0), narrow, **LENGTHS).aux == 8  # 480 digits
    for silent in (replace(narrow, rtd_head="none"), replace(narrow, rtd_position="decoder")):
        assert payload_rows(Unit("decoder_layer", 0), silent, **LENGTHS).aux == 3


def test_sequence_parallelism_shards_all_but_the_aux_rows():
    rows = payload_rows(Unit("decoder_layer", 0), METRO, sequence_shards=4, **LENGTHS)
    assert rows.parts == {"hidden": 64, "encoder_output": 128, "aux": 1}


def test_a_message_is_as_wide_as_the_network_it_leaves():
    narrow = replace(METRO, generator_hidden_size=256, generator_num_attention_heads=4)
    for kind, width in (
        ("generator_embedding", 256),
        ("generator_layer", 256),
        ("mlm_head", 768),
        ("encoder_layer", 768),
    ):
        rows = payload_rows(Unit(kind), narrow, **LENGTHS)
        assert (rows.width, rows.hidden) == (width, 512)
        assert payload_rows(Unit(kind), METRO, **LENGTHS).width == 768


def test_the_main_model_alone_sends_no_aux_rows():
    rows = payload_rows(Unit("decoder_layer", 0), ModelConfig(generator_num_layers=0), **LENGTHS)
    assert rows.parts == {"hidden": 256, "encoder_output": 512}
