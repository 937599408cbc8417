"""Lengths that follow from the objective, and that the loader's microbatches have them."""

from dataclasses import replace

import pytest

from megatron_metro.config.lengths import Lengths, mean_lengths, static_lengths
from megatron_metro.config.schema import DataConfig, ObjectiveConfig, RunConfig
from megatron_metro.data.objectives import build_objective
from megatron_metro.tokenizer import Vocabulary

METRO = RunConfig()
ALONE = replace(METRO, model=replace(METRO.model, generator_num_layers=0))
SPANS = RunConfig(objective=ObjectiveConfig(objective="t5-span"))


def test_means_and_static_slots():
    assert mean_lengths(METRO) == Lengths(encoder=512, decoder=512, masked=0.15 * 512, targets=0.15 * 512)
    assert static_lengths(METRO) == Lengths(encoder=512, decoder=512, masked=80, targets=80)
    down = replace(METRO, objective=ObjectiveConfig(probabilistic_rounding=False))
    assert mean_lengths(down).masked == 76
    assert static_lengths(ALONE) == Lengths(encoder=512, decoder=512, masked=0, targets=80)


def test_span_corruption():
    expected = Lengths(encoder=512, decoder=114, masked=0, targets=114)
    assert mean_lengths(SPANS) == static_lengths(SPANS) == expected


@pytest.mark.parametrize("run", [METRO, ALONE, SPANS])
@pytest.mark.parametrize(("encoder_length", "mask_prob"), [(512, 0.15), (231, 0.15), (40, 0.15), (100, 0.3)])
def test_the_loader_delivers_these_shapes(run, encoder_length, mask_prob):
    run = replace(
        run,
        data=DataConfig(encoder_seq_length=encoder_length),
        objective=replace(run.objective, mask_prob=mask_prob),
    )
    vocabulary = Vocabulary(num_pieces=1000, num_sentinels=128)
    shape = build_objective(run, vocabulary).shape(micro_batch_size=2)
    lengths = static_lengths(run)
    delivered = (shape.encoder_length, shape.decoder_length, shape.num_masked_slots, shape.num_target_slots)
    assert delivered == (lengths.encoder, lengths.decoder, lengths.masked, lengths.targets)
