"""Whole runs of metro-tiny under other objectives and ablations: real batches, validation, log, checkpoint, resume."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_metro.config.cli import parse_run
from megatron_metro.config.fields import change_values
from megatron_metro.config.objectives import PRETRAINING
from megatron_metro.config.presets import metro_tiny
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.terms import follow_objective
from megatron_metro.device import Device
from megatron_metro.parallel.groups import single_process
from megatron_metro.training.loop import pretrain
from tests.helpers.markov import TOKENIZER, markov_run, train, write_source

GENERATOR = {"mlm_loss", "generator_accuracy", "rtd_loss", "rtd_replaced_accuracy", "rtd_unreplaced_accuracy"}
DECODER = {"lm_loss", "replaced_accuracy", "unreplaced_accuracy"}
VARIANTS = {
    "spactor": ({"objective": "spactor"}, GENERATOR | {"lm_loss", "clean_lm_loss"}),
    "electra": ({"objective": "electra"}, GENERATOR),
    "coco-lm": ({"objective": "electra", "encoder_lm_head": True, "copy_mechanism": True}, GENERATOR | DECODER),
    "decoder's RTD, all positions": ({"rtd_position": "decoder", "lm_targets": "all"}, GENERATOR | DECODER),
    "masked tokens only": ({"lm_targets": "masked-only", "lm_head": "roberta"}, GENERATOR | DECODER),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_source(tmp_path_factory.mktemp("source"), num_documents=100)


def make_run(source: str, save: Path, changes: dict, num_steps: int) -> RunConfig:
    run = change_values(markov_run(source, save, num_steps, batch_size=8, log_interval=1), changes)
    run = follow_objective(run, metro_tiny(), changes)
    return replace(
        run,
        data=replace(run.data, encoder_seq_length=64),
        optimizer=replace(run.optimizer, lr_warmup_iters=0),
        training=replace(run.training, eval_iters=1),
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_of_ten_steps_and_one_that_goes_on(name: str, source: str, device: Device, tmp_path: Path) -> None:
    changes, names = VARIANTS[name]
    whole = train(make_run(source, tmp_path / "whole", changes, 10), device, single_process(device))
    held_out = {key for key in whole.held_out if key.endswith(("_loss", "_accuracy"))}
    assert held_out == names | {"total_loss"}
    assert all(math.isfinite(step[key]) for step in whole.steps for key in names - {"clean_lm_loss"})
    assert whole.steps[-1]["mlm_loss"] < whole.steps[0]["mlm_loss"]
    first = make_run(source, tmp_path / "parts", changes, 10)
    train(replace(first, training=replace(first.training, exit_interval=5)), device, single_process(device))
    second = make_run(source, tmp_path / "rest", changes, 10)
    second = replace(second, checkpoint=replace(second.checkpoint, load=first.checkpoint.save))
    parts = train(second, device, single_process(device))
    for found, expected in zip(parts.steps[-5:], whole.steps[-5:], strict=True):
        assert [found[key] for key in ("total_loss", "grad_norm")] == [expected["total_loss"], expected["grad_norm"]]


@pytest.mark.parametrize("objective", PRETRAINING)
def test_metro_tiny_trains_on_every_objective(objective: str, source: str, device: Device, tmp_path: Path) -> None:
    """Through the command's own entry, which starts and ends process groups itself."""
    single_process(device).destroy()
    flags = (
        f"--preset metro-tiny --objective {objective} --tokenizer-type NullTokenizer --vocab-size "
        f"{TOKENIZER.vocab_size} --data-path {source} --split 95,5,0 --save {tmp_path} --encoder-seq-length 64 "
        "--global-batch-size 8 --train-iters 6 --lr-warmup-iters 0 --lr 3e-3 --log-interval 1 --eval-iters 1"
    )
    pretrain(parse_run(flags.split(), 1), rank=0, world_size=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["split"] == "train"]
    assert [line["iteration"] for line in steps] == list(range(1, 7))
    assert all(math.isfinite(line["total_loss"]) and line["grad_norm"] > 0 for line in steps)
    assert steps[-1]["total_loss"] < steps[0]["total_loss"]
    assert [line["iteration"] for line in lines if line["split"] == "validation"] == [6]
