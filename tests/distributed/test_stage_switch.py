"""SPACTOR's switch at tau: to pass it is to stop there and go on, and what goes on is a plain T5."""

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import load_plain_tensors

from megatron_metro.checkpoint.start import find_start
from megatron_metro.config.errors import ConfigError
from megatron_metro.config.presets_t5 import spactor_base
from megatron_metro.config.schema import ParallelConfig, RunConfig
from megatron_metro.config.validation import require_training_inputs, resolve, validate
from megatron_metro.data.loader import build_loaders
from megatron_metro.device import Device, activate
from megatron_metro.parallel.groups import ParallelGroups, reinitialise
from megatron_metro.parallel.stage_plan import plan_layout
from megatron_metro.tokenizer import load_tokenizer
from megatron_metro.training.engine import Engine
from megatron_metro.training.loop import Trainer, train_stages
from megatron_metro.training.stages import list_stages
from megatron_metro.training.supervision import Supervisor
from tests.helpers.distributed import WorkerPool
from tests.helpers.markov import TOKENIZER, markov_run, write_source

Pool = Callable[[int], WorkerPool]

TAU, NUM_STEPS = 3, 6
LAYOUTS = {
    "one": (1, ParallelConfig(), "adafactor"),
    "tp2sp": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), "adafactor"),
    "pp2x2": (2, ParallelConfig(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2), "adam"),
    "dp2": (2, ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True), "adam"),
}


def make_run(prefix: str, save: Path, parallel: ParallelConfig, optimizer: str, **settings: Any) -> RunConfig:
    """Six steps of a small SPACTOR on the Markov source, the first three with its generator."""
    run, spactor = markov_run(prefix, save, NUM_STEPS, batch_size=4, log_interval=1), spactor_base()
    model = replace(
        spactor.model,
        encoder_num_layers=2,
        decoder_num_layers=2,
        generator_num_layers=1,
        hidden_size=16,
        ffn_hidden_size=32,
        num_attention_heads=2,
        kv_channels=8,
        generator_ffn_hidden_size=24,
        rtd_head_hidden_size=20,
        vocab_size=TOKENIZER.vocab_size,
    )
    size = 4 if parallel == ParallelConfig() else 2
    return replace(
        run,
        model=model,
        objective=replace(spactor.objective, spactor_tau=TAU),
        data=replace(run.data, encoder_seq_length=32, decoder_seq_length=None),
        parallel=parallel,
        optimizer=replace(run.optimizer, optimizer=optimizer, lr_warmup_iters=1),
        training=replace(run.training, micro_batch_size=size, eval_iters=1, exit_interval=settings.pop("exit", None)),
        checkpoint=replace(run.checkpoint, **settings),
    )


def train_run(run: RunConfig) -> None:
    """What tools/pretrain.py does once its process groups stand."""
    groups, device = reinitialise(run.parallel), activate("cpu")
    validate(run, groups.world_size)
    run = resolve(run, groups.world_size)
    require_training_inputs(run)
    tokenizer = load_tokenizer(run.tokenizer, run.model.vocab_size)
    stages = list_stages(run, find_start(run.checkpoint).iteration)
    loaders = [build_loaders(stage, tokenizer, groups.dp_rank, groups.dp_size) for stage in stages]
    train_stages(run, list(zip(stages, loaders, strict=True)), device, groups, tokenizer, Supervisor(run, groups))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Its lines without what depends on the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = {"seconds_per_iteration", "tflops_per_device"}
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_passing_tau_is_stopping_and_resuming_there(
    layout: str, pool: Pool, groups: ParallelGroups, tmp_path: Path
) -> None:
    world_size, parallel, optimizer = LAYOUTS[layout]
    prefix, through, halves = write_source(tmp_path), tmp_path / "through", tmp_path / "halves"
    run: Callable[[RunConfig], Any] = train_run if world_size == 1 else lambda c: pool(world_size).run(train_run, c)
    run(make_run(prefix, through, parallel, optimizer))
    run(make_run(prefix, halves, parallel, optimizer, exit=TAU))
    assert not (halves / f"iter_{NUM_STEPS:07d}").exists()
    run(make_run(prefix, halves, parallel, optimizer, load=str(halves)))
    assert read_metrics(through) == read_metrics(halves)
    steps = [line for line in read_metrics(through) if line["split"] == "train"]
    assert [line["iteration"] for line in steps] == list(range(1, NUM_STEPS + 1))
    assert ["mlm_loss" in line for line in steps] == [True] * TAU + [False] * (NUM_STEPS - TAU)
    found, expected = (load_plain_tensors(str(folder / f"iter_{NUM_STEPS:07d}")) for folder in (through, halves))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not [name for name in found if "generator." in name or "mlm_head" in name or "rtd_head" in name]


def count_bytes(engine: Engine) -> dict[str, int]:
    """Bytes of weights, of their gradients and of the optimizer's state, on this rank."""
    optimizer = engine.optimizer.optimizer
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    buffers = [buffer.grad_data for chunk in engine.chunks for buffer in chunk.buffers]
    weights = [parameter for piece in engine.pieces for parameter in piece.parameters()]
    return {
        name: sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        for name, tensors in (("weights", weights), ("gradients", buffers), ("state", states))
    }


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
def test_the_second_stage_holds_what_a_t5_holds(
    optimizer: str, groups: ParallelGroups, device: Device, tmp_path: Path
) -> None:
    prefix = write_source(tmp_path)
    run = resolve(make_run(prefix, tmp_path / "run", ParallelConfig(), optimizer), 1)
    tokenizer = load_tokenizer(run.tokenizer, run.model.vocab_size)
    first, second = list_stages(run, 0)
    plain = replace(
        second,
        model=replace(second.model, rtd_head="none", mlm_head="roberta", untie_mlm_head=False),
        objective=replace(run.objective, objective="t5-span"),
        checkpoint=replace(run.checkpoint, load=None, save=str(tmp_path / "plain")),
    )
    held, kept = {}, []
    for name, stage in (("first", first), ("second", second), ("plain", plain)):
        trainer = Trainer(
            stage, device, groups, tokenizer, *build_loaders(stage, tokenizer, 0, 1), Supervisor(stage, groups)
        )
        trainer.fit()
        held[name] = count_bytes(trainer.engine)
        kept.append(weakref.ref(next(trainer.engine.pieces[0].parameters())))
        trainer.close()
        assert kept[-1]() is None, "the weights of a closed stage are still held"
    print(held)
    assert held["second"] == held["plain"]
    assert all(held["first"][name] > held["second"][name] for name in held["first"])


def test_the_stages_of_a_run() -> None:
    run = resolve(make_run("data", Path("save"), ParallelConfig(), "adam"), 1)
    first, second = list_stages(run, 0)
    assert (first.training.train_iters, second.training.train_iters) == (TAU, NUM_STEPS)
    assert first.optimizer == second.optimizer == run.optimizer  # one schedule of the rate for both
    assert (second.checkpoint.load, second.model.generator_num_layers) == ("save", 0)
    assert not set(plan_layout(second).format()) & set("GgM")
    assert list_stages(run, TAU) == [replace(second, checkpoint=run.checkpoint)]
    for never in (None, NUM_STEPS):
        whole = replace(run, objective=replace(run.objective, spactor_tau=never))
        assert list_stages(whole, 0) == [whole]


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [({"save": None}, "--spactor-tau 3 is a save"), ({"no_save_optim": True}, "--no-save-optim")],
)
def test_what_the_switch_needs_is_asked_for(checkpoint: dict[str, Any], said: str) -> None:
    run = resolve(make_run("data", Path("save"), ParallelConfig(), "adam"), 1)
    run = replace(run, checkpoint=replace(run.checkpoint, **checkpoint))
    with pytest.raises(ConfigError, match=said):
        require_training_inputs(run)
