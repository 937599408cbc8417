"""Rates of everything before a step: tokenising, corrupting, loading; and what a step waits for its data.

The text is the documentation inside every CPython, its paragraphs drawn at random until there is enough.
"""

import json
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data import topics
from typing import Any, Literal, TypeAlias

from megatron_metro.config.presets import metro_base
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.validation import resolve
from megatron_metro.data.loader import READ_AHEAD_BLOCKS, StepLoader, build_loaders
from megatron_metro.data.objectives import build_objective
from megatron_metro.data.preprocess import PreprocessOptions, PreprocessReport, preprocess
from megatron_metro.data.vocabulary_training import VocabularyOptions, train_vocabulary, write_vocabulary
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.tokenizer import Tokenizer
from megatron_metro.training.benchmark import (
    Step,
    Workload,
    benchmark_vocabulary,
    build_step,
    draw_blocks,
    metro_run,
    start_process,
    summarise,
    time_side_by_side,
)

TEXT_CHARACTERS = 8_000_000
DOCUMENT_CHARACTERS = 20_000
TRAINED_CHARACTERS = 500_000
NUM_PIECES = 3000
NUM_SENTINELS = 128
BLOCKS_PER_CALL = 256
BLOCKS_PER_SMALL_CALL = 8  # as the step of one small microbatch
BATCH_LENGTH = 256  # tokens of the blocks that batches are made of; loaders and peers read 512
ObjectiveName: TypeAlias = Literal["metro", "t5-span", "spactor"]
OBJECTIVES: tuple[ObjectiveName, ...] = ("metro", "t5-span", "spactor")
WAITING = Workload()  # whose step waits for its batch

Report = Callable[[str], None]
# Makes the step of a peer from the prefix of sentences, their tokenizer and the blocks of a call.
BuildPeer = Callable[[str, Tokenizer, int], Step]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkText:
    """Text on disk and its tokenizer."""

    jsonl: Path
    tokenizer: Tokenizer


def measure_data(
    folder: Path, peers: Mapping[str, BuildPeer], num_rounds: int, num_warmups: int, report: Report
) -> dict[str, Any]:
    """The benchmark's result; `folder` takes a few files. Rates are per second of one processor."""
    groups, text = start_process(), write_text(folder)
    prefixes, rates = _time_preprocessing(text, folder, num_rounds, report)
    runs = {name: _run_on(prefixes[0], text.tokenizer, name) for name in OBJECTIVES}
    contestants = {f"{name}_batches": _build_batch_maker(run, BLOCKS_PER_CALL) for name, run in runs.items()}
    contestants |= {f"{n}_small_batches": _build_batch_maker(run, BLOCKS_PER_SMALL_CALL) for n, run in runs.items()}
    contestants |= {f"{name}_loader": _build_reader(run, text.tokenizer) for name, run in runs.items()}
    contestants |= {name: build(prefixes[1], text.tokenizer, BLOCKS_PER_CALL) for name, build in peers.items()}
    timings = time_side_by_side(contestants, num_rounds, num_warmups, report)
    blocks = {name: [BLOCKS_PER_CALL / timing.processor for timing in taken] for name, taken in timings.items()}
    medians = {name: statistics.median(taken) for name, taken in blocks.items()}
    waiting = time_side_by_side(_build_waiting(prefixes[0], text.tokenizer, groups), num_rounds, num_warmups, report)
    load, step = (statistics.median(timing.processor for timing in waiting[name]) for name in ("load", "step"))
    figures = {"blocks": "batches", "small_call_blocks": "small_batches", "loader_blocks": "loader"}
    return {
        **{
            f"{name.replace('-', '_')}_{figure}_per_second": round(medians[f"{name}_{contestant}"])
            for name in runs
            for figure, contestant in figures.items()
        },
        "preprocess_tokens_per_cpu_second": round(statistics.median(rates)),
        "loader_wait_percent": round(100 * load / _steps_read_at_once(WAITING.micro_batch_size) / step, 4),
        "t5_span_loader_speedup": {name: round(medians["t5-span_loader"] / medians[name], 1) for name in peers},
        "blocks_per_second": {name: summarise(taken) for name, taken in blocks.items()},
        "preprocess_rates": summarise(rates),
        "block_length": {"batches": BATCH_LENGTH} | {name: run.data.encoder_seq_length for name, run in runs.items()},
    }


def write_text(folder: Path) -> BenchmarkText:
    """JSON lines of documents drawn from the documentation, and a vocabulary learnt from their beginning."""
    paragraphs = [p for topic in sorted(topics.topics) for p in topics.topics[topic].split("\n\n") if p.strip()]
    generator = random.Random(0)
    documents = [_draw_document(paragraphs, generator) for _ in range(TEXT_CHARACTERS // DOCUMENT_CHARACTERS)]
    jsonl, sample = folder / "text.jsonl", folder / "sample.jsonl"
    lines = [json.dumps({"text": document}) + "\n" for document in documents]
    jsonl.write_text("".join(lines), encoding="utf-8")
    sample.write_text("".join(lines[: TRAINED_CHARACTERS // DOCUMENT_CHARACTERS]), encoding="utf-8")
    model = train_vocabulary(VocabularyOptions(inputs=(str(sample),), vocab_size=NUM_PIECES))
    path, _ = write_vocabulary(model, str(folder / "tokenizer"))
    return BenchmarkText(jsonl=jsonl, tokenizer=Tokenizer.load(path, NUM_SENTINELS))


def _draw_document(paragraphs: Sequence[str], generator: random.Random) -> str:
    drawn: list[str] = []
    length = 0
    while length < DOCUMENT_CHARACTERS:
        drawn.append(generator.choice(paragraphs))
        length += len(drawn[-1])
    return "\n".join(drawn)


def _time_preprocessing(
    text: BenchmarkText, folder: Path, num_rounds: int, report: Report
) -> tuple[tuple[str, str], list[float]]:
    """Prefixes of whole documents and of lines, and tokens per CPU second of every round."""
    rates = []
    for _ in range(num_rounds):
        found = _preprocess(text, folder, split_lines=False)
        rates.append(found.num_tokens / found.cpu_seconds)
        report(f"preprocessing: {found.summarise()}")
    lines = _preprocess(text, folder, split_lines=True)
    return (found.prefixes[0], lines.prefixes[0]), rates


def _preprocess(text: BenchmarkText, folder: Path, *, split_lines: bool) -> PreprocessReport:
    options = PreprocessOptions(
        inputs=(str(text.jsonl),), output_prefix=str(folder / "tokens"), split_lines=split_lines
    )
    return preprocess(options, text.tokenizer, lambda _: None)


def _run_on(prefix: str, tokenizer: Tokenizer, objective: ObjectiveName) -> RunConfig:
    """METRO base's blocks, T5's or SPACTOR's, of this text."""
    run = metro_base()
    model = replace(run.model, generator_num_layers=0) if objective == "t5-span" else run.model
    return resolve(
        replace(
            run,
            model=replace(model, vocab_size=tokenizer.vocab_size),
            objective=replace(run.objective, objective=objective),
            data=replace(run.data, data_path=(prefix,), split="100,0,0", num_workers=0),
            training=replace(run.training, micro_batch_size=16, global_batch_size=BLOCKS_PER_CALL, eval_iters=0),
        ),
        world_size=1,
    )


def _build_batch_maker(run: RunConfig, blocks_per_call: int) -> Step:
    """Blocks that lie in memory to microbatches, so many at once: corruption alone."""
    run = replace(run, data=replace(run.data, encoder_seq_length=BATCH_LENGTH, decoder_seq_length=None))
    objective, blocks = build_objective(run, benchmark_vocabulary(run)), draw_blocks(run, blocks_per_call)

    def make_batches() -> None:
        for _ in range(BLOCKS_PER_CALL // blocks_per_call):
            objective.make_batch(blocks)

    return make_batches


def _build_reader(run: RunConfig, tokenizer: Tokenizer) -> Step:
    """All that a step does for its data: order, reading, checks, corruption."""
    loader = open_loader(run, tokenizer)
    num_microbatches = BLOCKS_PER_CALL // run.training.micro_batch_size
    return lambda: loader.next_step(num_microbatches)


def open_loader(run: RunConfig, tokenizer: Tokenizer) -> StepLoader:
    """The training loader of one process."""
    loader, _ = build_loaders(run, tokenizer, dp_rank=0, dp_size=1)
    return loader


def _build_waiting(prefix: str, tokenizer: Tokenizer, groups: ParallelGroups) -> dict[str, Step]:
    """The step of the step benchmark, and making on the spot the batches of the steps that are read at once."""
    run = metro_run(WAITING)
    reading = replace(
        run,
        data=replace(run.data, data_path=(prefix,), split="100,0,0", num_workers=0),
        model=replace(run.model, vocab_size=tokenizer.vocab_size),
        training=replace(run.training, eval_iters=0),
    )
    loader = open_loader(reading, tokenizer)
    num_steps = _steps_read_at_once(run.training.micro_batch_size)

    def load() -> None:
        for _ in range(num_steps):
            loader.next_step(1)

    return {"load": load, "step": build_step(run, groups)}


def _steps_read_at_once(micro_batch_size: int) -> int:
    """Steps of one microbatch that the loader reads ahead."""
    return max(1, READ_AHEAD_BLOCKS // micro_batch_size)
