"""Imported weights at another layout and back: every format, its tensors to the bit after a load and a save at TP2xPP2.

The load is a trainer's: `--finetune` from the imported folder, and `--pretrained-checkpoint`.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_metro.checkpoint.start import read_saved_settings
from megatron_metro.config.fields import change_values
from megatron_metro.config.schema import CheckpointConfig, ParallelConfig, RunConfig
from megatron_metro.conversion.convert import Conversion, convert, open_source
from megatron_metro.conversion.weights import have_same_bits
from megatron_metro.parallel.groups import reinitialise
from megatron_metro.training.loading import load_checkpoint
from megatron_metro.training.saving import save_checkpoint
from megatron_metro.training.state import TrainState
from tests.helpers import conversions, stored_run, tiny
from tests.helpers.fairseq_file import SIZES, make_weights, save

PARALLEL = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
# TP2 wants even heads and feed-forward widths; all other sizes stay odd.
MODELS = {
    "hf-t5 v1.0": ("hf-t5", lambda: conversions.make_t5(num_heads=2, d_ff=34, num_decoder_layers=3)),
    "hf-t5 v1.1": (
        "hf-t5",
        lambda: conversions.make_t5(num_heads=2, d_ff=34, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "hf-bart": (
        "hf-bart",
        lambda: conversions.make_bart(
            d_model=22,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=34,
            decoder_ffn_dim=34,
        ),
    ),
    "hf-metro-t0": ("hf-metro-t0", lambda: conversions.make_metro(num_heads=2, d_ff=34)),
}


def load_and_save(checkpoint: CheckpointConfig) -> bool:
    """What each of four ranks of a new run does; whether it counts from 0."""
    groups = reinitialise(PARALLEL)
    settings, goes_on = read_saved_settings(checkpoint)
    run = replace(change_values(RunConfig(), settings), parallel=PARALLEL, checkpoint=checkpoint)
    assert checkpoint.save is not None
    stored = stored_run.build_run(Path(checkpoint.save), groups, run)
    before = {name: weight.clone() for name, weight in stored.weights().items()}
    state = load_checkpoint(run, stored.chunks, stored.optimizer, groups)
    assert any(not torch.equal(weight, before[name]) for name, weight in stored.weights().items())
    save_checkpoint(run, TrainState(iteration=1), stored.chunks, stored.optimizer, groups)
    return state == TrainState() and not goes_on


@pytest.mark.parametrize("name", MODELS)
def test_bits_survive_another_layout(name, pool, tmp_path):
    form, make = MODELS[name]
    network = make()
    network.save_pretrained(tmp_path / "theirs")
    ours = conversions.convert_to_ours(form, tmp_path / "theirs", tmp_path / "ours")
    checkpoint = CheckpointConfig(load=str(ours), save=str(tmp_path / "saved"), finetune=True)
    if name == "hf-metro-t0":
        checkpoint = CheckpointConfig(pretrained_checkpoint=str(ours), save=str(tmp_path / "saved"))
    assert all(pool(4).run(load_and_save, checkpoint))
    first, second = (open_source("megatron", folder, None, {}).weights for folder in (ours, tmp_path / "saved"))
    assert set(first.names()) == set(second.names())
    assert all(have_same_bits(first.read(weight), second.read(weight)) for weight in first.names())
    back = conversions.convert_back(form, tmp_path / "saved", tmp_path / "back")
    found = type(network).from_pretrained(back)
    conversions.assert_same_tensors(found.state_dict(), network.state_dict())


def test_generator_and_heads_of_fairseq_survive_another_layout(pool, tmp_path):
    model = tiny.tiny_model(**SIZES)
    weights = make_weights(model)
    save(tmp_path / "run.pt", model, weights)
    settings = {"vocab_extra_ids": 40, "relative_attention_max_distance": 12}
    paths = {"input": tmp_path / "run.pt", "output": tmp_path / "ours"}
    convert(Conversion(source="fairseq", target="megatron", **paths, settings=settings))
    checkpoint = CheckpointConfig(load=str(tmp_path / "ours"), save=str(tmp_path / "saved"), finetune=True)
    assert all(pool(4).run(load_and_save, checkpoint))
    found = open_source("megatron", tmp_path / "saved", None, {}).weights
    conversions.assert_same_tensors({name: found.read(name) for name in found.names()}, weights)
