"""A Markov source that a METRO learns within minutes, as token files, and whole runs of metro-tiny on it.

Each of 64 states is followed by one of 2, equally likely, and each follows 2 others: all states are equally frequent,
so that a model which has learnt frequencies only is at ln 64 = 4.16 nats, one that reads what is before a token at
ln 2 = 0.69, and one that reads both sides below that.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_metro.config.presets import metro_tiny
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.validation import require_training_inputs, resolve, validate
from megatron_metro.data.indexed import TokenWriter
from megatron_metro.data.loader import build_loaders
from megatron_metro.device import Device
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.tokenizer import NullTokenizer, load_tokenizer
from megatron_metro.training.engine import Engine
from megatron_metro.training.loop import Trainer
from megatron_metro.training.reporting import METRICS_FILE
from megatron_metro.training.supervision import Supervisor

NUM_STATES = 64
UNIGRAM_ENTROPY = log(NUM_STATES)
FIRST_STATE = NullTokenizer(NUM_STATES, 1).mask_id + 1  # the ids before it are special
NUM_SENTINELS = 128  # metro-tiny's
TOKENIZER = NullTokenizer(FIRST_STATE + NUM_STATES, NUM_SENTINELS)

Metrics = dict[str, float]


def list_successors() -> NDArray[np.int64]:
    """The two successors of each state [64, 2]."""
    states = np.arange(NUM_STATES)
    return np.stack([states + 1, np.where(states % 2 == 0, states + 2, states - 2)], axis=1) % NUM_STATES


def draw_documents(num_documents: int, length: int, seed: int) -> NDArray[np.int64]:
    """States [num_documents, length] of independent chains, each from a random start."""
    rng = np.random.default_rng(seed)
    successors = list_successors()
    choices = rng.integers(2, size=(length, num_documents))
    states = np.empty((length, num_documents), dtype=np.int64)
    states[0] = rng.integers(NUM_STATES, size=num_documents)
    for position in range(1, length):
        states[position] = successors[states[position - 1], choices[position]]
    return states.T


def write_source(folder: Path, num_documents: int = 1000, length: int = 1000, seed: int = 7) -> str:
    """Write the source as .bin and .idx; returns their prefix."""
    prefix = str(folder / "markov")
    with TokenWriter(prefix, TOKENIZER, append_eod=False, split_lines=False) as writer:
        for document in draw_documents(num_documents, length, seed) + FIRST_STATE:
            writer.add_documents(document, [[length]])
        writer.finish()
    return prefix


def markov_run(prefix: str, save: Path, num_steps: int, batch_size: int = 32, **logging: Any) -> RunConfig:
    """metro-tiny on the source: all as in the preset but data, batches, length of the run and a constant rate."""
    run = metro_tiny()
    return replace(
        run,
        model=replace(run.model, vocab_size=TOKENIZER.vocab_size),
        tokenizer=replace(run.tokenizer, tokenizer_type="NullTokenizer", vocab_extra_ids=NUM_SENTINELS),
        data=replace(run.data, data_path=(prefix,), split="95,5,0", num_workers=0),
        optimizer=replace(run.optimizer, lr_decay_style="constant"),
        training=replace(
            run.training,
            micro_batch_size=batch_size,
            global_batch_size=batch_size,
            train_iters=num_steps,
            eval_interval=0,
            eval_iters=10,
            device="cpu",
        ),
        checkpoint=replace(run.checkpoint, save=str(save)),
        logging=replace(run.logging, **logging),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """What a run wrote to metrics.jsonl."""

    steps: list[Metrics]  # one per log line, of training
    held_out: Metrics  # of the validation at the end


def train(
    run: RunConfig,
    device: Device,
    groups: ParallelGroups,
    mutate: Callable[[Engine], AbstractContextManager[None]] | None = None,
) -> Curves:
    """The whole run in this process, as tools/pretrain.py would do it; `mutate` breaks something on purpose."""
    validate(run, world_size=1)
    run = resolve(run, world_size=1)
    require_training_inputs(run)
    tokenizer = load_tokenizer(run.tokenizer, run.model.vocab_size)
    train_loader, valid_loader = build_loaders(run, tokenizer, dp_rank=0, dp_size=1)
    trainer = Trainer(run, device, groups, tokenizer, train_loader, valid_loader, Supervisor(run, groups))
    with mutate(trainer.engine) if mutate is not None else nullcontext():
        trainer.fit()
    assert run.checkpoint.save is not None
    lines = [json.loads(line) for line in (Path(run.checkpoint.save) / METRICS_FILE).read_text().splitlines()]
    [held_out] = (line for line in lines if line["split"] == "validation")
    return Curves(steps=[line for line in lines if line["split"] == "train"], held_out=held_out)


def base_rate_entropy(replace_ratio: float) -> float:
    """RTD loss, in nats, of a judge who knows nothing but the share of replaced tokens (in percent)."""
    share = replace_ratio / 100
    return 0.0 if share in (0.0, 1.0) else -share * log(share) - (1 - share) * log(1 - share)
