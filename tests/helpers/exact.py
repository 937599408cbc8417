"""Whole runs of the real Trainer, stopped and resumed anywhere, and a digest of everything a process holds at a step.

`snapshot` is taken where the loop asks its loader for the next step: after everything of the step before, saving and
validation included. A resumed run is equal when its first snapshot, right after loading, and all that follow are those
of the uninterrupted run.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_metro.checkpoint.start import find_start
from megatron_metro.config.fields import change_values
from megatron_metro.config.presets import metro_tiny
from megatron_metro.config.presets_t5 import spactor_base
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.terms import follow_objective
from megatron_metro.config.validation import require_training_inputs, resolve, validate
from megatron_metro.data.loader import build_loaders
from megatron_metro.device import activate
from megatron_metro.parallel.groups import reinitialise
from megatron_metro.tokenizer import load_tokenizer
from megatron_metro.training.identity import check_identity, describe_identity
from megatron_metro.training.loop import Trainer
from megatron_metro.training.model_space import get_num_updates
from megatron_metro.training.random_state import read_random_states
from megatron_metro.training.stages import list_stages
from megatron_metro.training.supervision import Supervisor
from tests.helpers.distributed import WorkerPool
from tests.helpers.markov import TOKENIZER, markov_run

Snapshot = dict[str, str]  # digest of each tensor and number by name

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
}
OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
SIZES = {
    "hidden_size": 16,
    "ffn_hidden_size": 32,
    "num_attention_heads": 2,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "generator_dropout": 0.1,
    "vocab_size": TOKENIZER.vocab_size,
    "encoder_seq_length": 32,
    "decoder_seq_length": None,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What is trained, and what a layout is combined with."""

    settings: dict[str, Any]
    on_layout: dict[str, dict[str, Any]] = field(default_factory=dict)


KINDS = {
    # The batch grows from 4 to 8 and the weight of a loss moves.
    "metro, AdamW": Kind(
        settings={"rampup_batch_size": (4, 4, 32), "rtd_loss_weight_schedule": "0:0,40:50"}, on_layout={"dp2": OVERLAP}
    ),
    "metro, AdamW, BF16": Kind(
        settings={"bf16": True, "clip_grad": 1.0},
        on_layout={"dp2": OVERLAP, "pp2": {"num_virtual_stages_per_pipeline_rank": 2}},
    ),
    "spactor, Adafactor": Kind(settings={"objective": "spactor", "optimizer": "adafactor"}),
    "t5, Adafactor": Kind(settings={"objective": "t5-span", "optimizer": "adafactor"}),
    # The loss scale doubles every seven steps.
    "t5, AdamW, FP16": Kind(
        settings={"objective": "t5-span", "fp16": True, "loss_scale_window": 7}, on_layout={"dp2": OVERLAP}
    ),
}
EVAL_INTERVAL, LOG_INTERVAL = 7, 5


def make_run(kind: str, layout: str, prefix: str, save: Path, num_steps: int, **settings: Any) -> RunConfig:
    """The resolved run of a kind: dropout on, saved after every step, validated and logged now and then."""
    world_size, parallel = LAYOUTS[layout]
    run = markov_run(prefix, save, num_steps)
    values = {**SIZES, **KINDS[kind].settings, **parallel, **KINDS[kind].on_layout.get(layout, {})}
    if values.get("objective") == "spactor":
        model = replace(spactor_base().model, encoder_num_layers=2, decoder_num_layers=2, generator_num_layers=1)
        run = replace(run, model=replace(model, kv_channels=8, generator_ffn_hidden_size=24, rtd_head_hidden_size=20))
    values |= {
        "spactor_tau": num_steps // 2,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "lr_decay_style": "cosine",
        "lr_warmup_iters": 3,
        "eval_interval": EVAL_INTERVAL,
        "eval_iters": 1,
        "save_interval": 1,
        "log_interval": LOG_INTERVAL,
        **settings,
    }
    run = follow_objective(change_values(run, values), metro_tiny(), values)
    validate(run, world_size)
    return resolve(run, world_size)


def train(run: RunConfig, last: int) -> list[Snapshot]:
    """What tools/pretrain.py does once its process groups stand, up to step `last`; a snapshot before every step."""
    require_training_inputs(run)
    groups, device = reinitialise(run.parallel), activate("cpu")
    tokenizer = load_tokenizer(run.tokenizer, run.model.vocab_size)
    start, found = find_start(run.checkpoint), []
    for number, stage in enumerate(list_stages(run, start.iteration)):
        loaders = build_loaders(stage, tokenizer, groups.dp_rank, groups.dp_size)
        if number == 0:
            check_identity(stage, describe_identity(tokenizer, loaders[0]), start)
        end = min(stage.training.train_iters or 0, last)
        stage = replace(stage, training=replace(stage.training, train_iters=end))
        trainer = Trainer(stage, device, groups, tokenizer, *loaders, Supervisor(stage, groups))
        watch(trainer, found)
        trainer.fit()
        found.append(snapshot(trainer))
        loaders[0].close()
        trainer.close()
        if end == last:
            break
    return found


def watch(trainer: Trainer, found: list[Snapshot]) -> None:
    """Take a snapshot whenever the loop asks for the microbatches of a step."""
    next_step = trainer.train_loader.next_step

    def snapshot_first(num_microbatches: int) -> Any:
        found.append(snapshot(trainer))
        return next_step(num_microbatches)

    trainer.train_loader.next_step = snapshot_first  # type: ignore[method-assign]


def snapshot(trainer: Trainer) -> Snapshot:
    """Digests of all that decides how this rank goes on, and of its counters."""
    trainer.engine.synchronise_parameters()
    optimizer, digests = trainer.engine.optimizer, {}
    for number, piece in enumerate(trainer.engine.pieces):
        for name, parameter in piece.named_parameters():
            digests[f"weight {number} {name}"] = digest(parameter.detach())
    for number, parameter in enumerate(optimizer.get_parameters()):
        digests[f"main {number}"] = digest(parameter.detach())
        for name, value in optimizer.optimizer.state[parameter].items():
            digests[f"{name} {number}"] = digest(value)
    for name, state in read_random_states("cpu").items():
        digests[f"random {name}"] = digest(state)
    digests["random python"] = repr(random.getstate())
    digests["random numpy"] = repr(np.random.get_state()[1].tolist())
    numbers: dict[str, Any] = {f"state {name}": value for name, value in asdict(trainer.state).items()}
    [group] = optimizer.param_groups
    numbers |= {f"group {name}": value for name, value in group.items() if name not in ("params", "lr")}
    scaler = getattr(optimizer, "grad_scaler", None)
    numbers |= {f"scaler {name}": float(value) for name, value in (scaler.state_dict() if scaler else {}).items()}
    numbers |= {"updates": get_num_updates(optimizer), "next sample": trainer.train_loader.consumed_samples}
    return digests | {name: repr(value) for name, value in numbers.items()}


def digest(tensor: torch.Tensor) -> str:
    """Of shape, type and every bit."""
    contiguous = tensor.detach().cpu().contiguous()
    content = contiguous.reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{contiguous.dtype} {tuple(contiguous.shape)} {hashlib.sha256(content).hexdigest()[:16]}"


def list_differences(found: Sequence[Snapshot], expected: Sequence[Snapshot]) -> list[str]:
    """Names of what is not bit-equal, step by step."""
    assert len(found) == len(expected)
    return [
        f"{name} at {number} steps after the load"
        for number, (mine, other) in enumerate(zip(found, expected))
        for name in sorted(mine.keys() | other.keys())
        if mine.get(name) != other.get(name)
    ]


def train_whole(run: RunConfig, num_steps: int) -> None:
    """The uninterrupted run; its snapshots stay in this process for `resume_and_compare`."""
    _WHOLE[:] = train(run, num_steps)


_WHOLE: list[Snapshot] = []


def resume_and_compare(run: RunConfig, saved: Sequence[int], num_steps: int, folder: str) -> list[str]:
    """From each saved step, some steps further; what is not as in the uninterrupted run, on this rank."""
    wrong = []
    for step in saved:
        spoil_random_states()
        last = min(step + num_steps, run.training.train_iters or 0)
        checkpoint = replace(run.checkpoint, load=run.checkpoint.save, save=f"{folder}/{step}", ckpt_step=step)
        found = train(replace(run, checkpoint=replace(checkpoint, save_interval=None)), last)
        # SPACTOR's switch has two snapshots, of the model before and after it.
        tau = run.objective.spactor_tau if run.objective.objective == "spactor" else None
        first, end = (index + (tau is not None and index + late > tau) for index, late in ((step, 1), (last, 0)))
        expected = [dict(one) for one in _WHOLE[first : end + 1]]
        # A run that ends validates, whatever the interval.
        for one in (found[-1], expected[-1]):
            del one["state consumed_valid_samples"]
        wrong += [f"from step {step}: {name}" for name in list_differences(found, expected)]
    return wrong


def spoil_random_states() -> None:
    """A process that has done other things since."""
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)


def run_on(pool: Callable[[int], WorkerPool], layout: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on every process of a layout; one process is this one."""
    world_size, _ = LAYOUTS[layout]
    return [function(*arguments)] if world_size == 1 else pool(world_size).run(function, *arguments, timeout=1800.0)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = {"seconds_per_iteration", "tflops_per_device"}
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]
