"""SPACTOR, ELECTRA and METRO's ablations on one process against their definitions: losses, log and every gradient."""

from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor

from megatron_metro.config.schema import ModelConfig, ObjectiveConfig
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.training.engine import Engine
from tests.helpers import tiny
from tests.helpers.oracle import compare, make_engine, split
from tests.helpers.reference_variants import ReferenceVariant

SPACTOR = {"objective": "spactor", "rtd_loss_weight": 10.0, "lm_loss_weight": 10.0}
ELECTRA = {"decoder_num_layers": 0}
# Changes of the tiny model, and the objective.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "spactor": ({}, SPACTOR),
    "spactor, means": ({}, {**SPACTOR, "spactor_normalisation": "mean"}),
    "RTD on the decoder": ({"rtd_position": "decoder"}, {}),
    "weighted by a decoder's RTD": ({"rtd_position": "decoder"}, {"weighted_lm_loss": True}),
    "RTD on the decoder, all positions": ({"rtd_position": "decoder"}, {"lm_targets": "all"}),
    "RoBERTa's LM head": ({"lm_head": "roberta"}, {}),
    "RoBERTa's LM head, untied": ({"lm_head": "roberta", "untie_embeddings_and_output_weights": True}, {}),
    "an LM head with a bias": ({"lm_head": "linear-bias"}, {}),
    "all positions": ({}, {"lm_targets": "all"}),
    "masked tokens only": ({}, {"lm_targets": "masked-only"}),
    "electra": (ELECTRA, {"objective": "electra"}),
    # As in its paper, and as in its released code, which weighs the LM loss by RTD's verdicts.
    "coco-lm": ({**ELECTRA, "encoder_lm_head": True, "copy_mechanism": True}, {"objective": "electra"}),
    "coco-lm, weighted": ({**ELECTRA, "encoder_lm_head": True}, {"objective": "electra", "weighted_lm_loss": True}),
    "an encoder's LM head, all positions": (
        {**ELECTRA, "encoder_lm_head": True, "lm_head": "roberta"},
        {"objective": "electra", "lm_targets": "all"},
    ),
    "copies": ({"copy_mechanism": True}, {}),
    "copies by a decoder's RTD": ({"copy_mechanism": True, "rtd_position": "decoder"}, {}),
    "copies, all positions": ({"copy_mechanism": True, "rtd_position": "decoder"}, {"lm_targets": "all"}),
    "copies, masked tokens only": ({"copy_mechanism": True}, {"lm_targets": "masked-only"}),
}


def make_narrow_engine(groups: ParallelGroups, model: ModelConfig, objective: ObjectiveConfig) -> Engine:
    engine = make_engine(groups, model, objective)
    tiny.prefer_few_ids(engine.pieces)
    return engine


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_gradients_equal_the_definition(groups: ParallelGroups, name: str, padded: bool) -> None:
    model, objective = tiny.tiny_model(**VARIANTS[name][0]), ObjectiveConfig(**VARIANTS[name][1])
    engine = make_narrow_engine(groups, model, objective)
    batch = tiny.objective_batch(objective, 6, seed=31, padded=padded, has_decoder=model.has_decoder)
    microbatches = split(tiny.narrow(batch), 2)

    def restate(weights: Mapping[str, Tensor]) -> ReferenceVariant:
        return ReferenceVariant(weights, model, objective, microbatches)

    log = compare(engine, microbatches, restate)
    expected = restate(dict(engine.pieces[0].named_parameters()))
    assert set(log) == set(expected.log)
    assert 0 < len(expected.hits["rtd replaced"]) < len(expected.hits["generator"])  # both kinds of fills


def test_validation_scores_the_clean_input_too(groups: ParallelGroups) -> None:
    objective = ObjectiveConfig(**SPACTOR)
    engine = make_engine(groups, tiny.tiny_model(), objective)
    batches = [split(tiny.objective_batch(objective, 4, seed=seed), 2) for seed in (32, 33)]
    log = engine.evaluate(batches)
    weights = {name: p.detach() for name, p in engine.pieces[0].named_parameters()}
    microbatches = [microbatch for batch in batches for microbatch in batch]
    for is_clean, name in ((False, "lm loss"), (True, "clean lm loss")):
        expected = ReferenceVariant(weights, engine.run.model, objective, microbatches, is_clean=is_clean)
        assert log[name] == pytest.approx(expected.log["lm loss"], rel=1e-11)
    assert log["clean lm loss"] != pytest.approx(log["lm loss"], rel=1e-6)
    assert "clean lm loss" not in engine.accumulate_gradients(microbatches)
