"""What a loss is made of follows the objective; what was chosen stays."""

import pytest

from megatron_metro.config.chain import build_chain
from megatron_metro.config.cli import load_config, read_run, save_config
from megatron_metro.config.objectives import OBJECTIVES
from megatron_metro.config.schema import ObjectiveConfig
from megatron_metro.config.terms import is_divided_by_sequences, logit_means_original, target_kind


@pytest.mark.parametrize(
    ("objective", "kind"),
    [
        ({}, "fills"),
        ({"lm_targets": "masked-only"}, "fills"),
        ({"lm_targets": "all"}, "tokens"),
        ({"objective": "electra"}, "fills"),
        ({"objective": "electra", "lm_targets": "all"}, "tokens"),
        ({"objective": "spactor"}, "others"),
        ({"objective": "t5-metro", "lm_targets": "all"}, "others"),
    ],
)
def test_what_targets_stand_for(objective, kind):
    assert target_kind(ObjectiveConfig(**objective)) == kind


def test_only_spactor_counts_sequences_and_originals():
    for name in OBJECTIVES:
        objective = ObjectiveConfig(objective=name)
        assert is_divided_by_sequences(objective) == logit_means_original(objective) == (name == "spactor")
    assert not is_divided_by_sequences(ObjectiveConfig(objective="spactor", spactor_normalisation="mean"))


def read(words: str):
    return read_run(["--preset", "metro-tiny", *words.split()])


def test_depths_and_weights_follow_the_objective(tmp_path):
    found = {}
    for name in ("metro", "electra", "spactor", "t5-span"):
        run = read(f"--objective {name}")
        weights = (run.objective.mlm_loss_weight, run.objective.rtd_loss_weight, run.objective.lm_loss_weight)
        found[name] = (run.model.generator_num_layers, run.model.decoder_num_layers, weights)
        save_config(run, tmp_path / name)
        assert load_config(tmp_path / name) == run
    assert found == {
        "metro": (2, 2, (1.0, 50.0, 1.0)),
        "electra": (2, 0, (1.0, 50.0, 1.0)),
        "spactor": (2, 2, (1.0, 10.0, 10.0)),
        "t5-span": (0, 2, (1.0, 50.0, 1.0)),
    }


def test_what_is_chosen_stays():
    run = read("--objective spactor --lm-loss-weight 1 --rtd-loss-weight 50")
    assert (run.objective.rtd_loss_weight, run.objective.lm_loss_weight) == (50.0, 1.0)
    assert read("--objective electra --decoder-num-layers 3").model.decoder_num_layers == 3
    assert read("--rtd-loss-weight 7").objective.rtd_loss_weight == 7.0


def test_the_chain_ends_with_a_head():
    ends = {
        "": "DddL",
        "--rtd-position decoder": "DddL",
        "--objective electra": "R",
        "--objective electra --encoder-lm-head": "RL",
        "--objective electra --encoder-lm-head --rtd-head none": "L",
    }
    letters = {"encoder_head": "R", "decoder_embedding": "D", "decoder_layer": "d", "lm_head": "L"}
    for words, end in ends.items():
        units = [letters.get(unit.kind, "") for unit in build_chain(read(words).model)]
        assert "".join(units).removeprefix("R" * (end[0] == "D" and "decoder" not in words)) == end
