"""Lengths that follow from the objective, and that the loader's microbatches have them."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_metro.config.lengths import Lengths, mean_lengths, static_lengths
from megatron_metro.config.objectives import OBJECTIVES, PRETRAINING
from megatron_metro.config.schema import DataConfig, ObjectiveConfig, RunConfig
from megatron_metro.data.blocks import Blocks
from megatron_metro.data.objectives import BUILDERS, build_objective
from megatron_metro.data.randomness import BlockKeys
from megatron_metro.tokenizer import Vocabulary

METRO = RunConfig()
ALONE = replace(METRO, model=replace(METRO.model, generator_num_layers=0))
VOCABULARY = Vocabulary(num_pieces=1000, num_sentinels=128)
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


def make_run(name: str, **objective) -> RunConfig:
    return RunConfig(objective=ObjectiveConfig(objective=name, **objective))


def test_lengths_of_all_objectives_at_512():
    expected = {  # static decoder, masked slots and target slots
        "metro": (512, 80, 80),
        "electra": (0, 80, 80),
        "spactor": (114, 80, 114),
        "t5-span": (114, 0, 114),
        "t5-metro": (104, 0, 104),
        "t5-iid": (160, 0, 160),
        "prefix-lm": (512, 0, 512),
        "bert-style": (512, 0, 512),
        "mass-style": (512, 0, 512),
        "deshuffle": (512, 0, 512),
        "drop-tokens": (91, 0, 91),
        "text-to-text": (512, 0, 512),
    }
    assert set(expected) == set(OBJECTIVES) == set(BUILDERS)
    for name, (decoder, masked, targets) in expected.items():
        lengths = Lengths(encoder=512, decoder=decoder, masked=masked, targets=targets)
        assert static_lengths(make_run(name)) == lengths, name
    assert static_lengths(make_run("metro", lm_targets="all")).targets == 512
    assert static_lengths(make_run("metro", lm_targets="masked-only")).decoder == 80
    assert static_lengths(make_run("t5-metro", lm_targets="all")).decoder == 512


VARIANTS = [
    *((name, {}) for name in PRETRAINING),
    ("metro", {"lm_targets": "all"}),
    ("metro", {"lm_targets": "masked-only", "mask_spans": True}),
    ("electra", {"lm_targets": "all"}),
    ("t5-metro", {"lm_targets": "all"}),
    ("t5-metro", {"mask_prob": 0.3, "mean_noise_span_length": 2.0}),
    ("spactor", {"spactor_mask_prob": 0.2, "probabilistic_rounding": False}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_means_are_those_of_the_batches(name, changes):
    """To 1 %, of blocks without </s> inside, where SPACTOR masks nothing."""
    run = make_run(name, **changes)
    lengths = mean_lengths(run)
    objective = build_objective(run, VOCABULARY)
    generator = np.random.default_rng(0)
    keys = BlockKeys(seed=1, identity=np.zeros(4000, np.uint64), epoch=np.zeros(4000, int), block=np.arange(4000))
    tokens = generator.integers(5, 1000, (4000, objective.raw_length))
    batch = objective.make_batch(Blocks(tokens=tokens, lengths=np.full(4000, objective.raw_length), keys=keys))
    # A text's split varies so much that its mean over 4,000 is known to 1 % only.
    tolerance = 0.04 if name == "prefix-lm" else 0.01
    assert lengths.targets == pytest.approx(batch.target_valid.sum().item() / 4000, rel=tolerance)
    masked = 0.0 if batch.masked_valid is None else batch.masked_valid.sum().item() / 4000
    assert lengths.masked == pytest.approx(masked, rel=0.003)
    assert (lengths.encoder, lengths.decoder) == (batch.shape.encoder_length, batch.shape.decoder_length)


@pytest.mark.parametrize("run", [METRO, ALONE, *map(make_run, OBJECTIVES)])
@pytest.mark.parametrize(("encoder_length", "mask_prob"), [(512, 0.15), (231, 0.15), (40, 0.15), (100, 0.3)])
def test_the_loader_delivers_these_shapes(run, encoder_length, mask_prob):
    run = replace(
        run,
        data=DataConfig(encoder_seq_length=encoder_length),
        objective=replace(run.objective, mask_prob=mask_prob),
    )
    shape = build_objective(run, VOCABULARY).shape(micro_batch_size=2)
    lengths = static_lengths(run)
    delivered = (shape.encoder_length, shape.decoder_length, shape.num_masked_slots, shape.num_target_slots)
    assert delivered == (lengths.encoder, lengths.decoder, lengths.masked, lengths.targets)
