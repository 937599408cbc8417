"""Step times of several models side by side in one process, and the rate of plain matrix products to hold them against.

Contestants take turns (A B C A B C ...), so that a change of the machine's speed meets all of them alike. Seconds are
processor time of this process: with one thread they are what the clock shows on an idle machine, and other work on a
shared one does not count. The result also says how much longer the clock ran.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from megatron_metro.analysis.cost import main_model, training_flops
from megatron_metro.batch import Microbatch
from megatron_metro.config.chain import build_chain
from megatron_metro.config.lengths import mean_lengths
from megatron_metro.config.presets import metro_tiny
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.validation import resolve
from megatron_metro.data.blocks import Blocks
from megatron_metro.data.objectives import build_objective
from megatron_metro.data.randomness import BlockKeys
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.parallel.layout import single_piece
from megatron_metro.tokenizer import Vocabulary
from megatron_metro.training.engine import Engine
from megatron_metro.training.optimizer import set_learning_rate

GEMM_SIZE = 1024
GEMM_REPEATS = 10
NUM_SENTINELS = 128
Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds of one call."""

    processor: float
    clock: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Sizes of the benchmark's model and batch; the defaults are the ones targets are stated for."""

    hidden_size: int = 256
    num_layers: int = 4  # of encoder and of decoder
    generator_num_layers: int = 2
    seq_length: int = 256
    vocab_size: int = 8192
    micro_batch_size: int = 8
    dropout: float = 0.0
    matmul_precision: str = "highest"


def metro_run(workload: Workload) -> RunConfig:
    """A METRO run of these sizes, with heads of width 64 and a feed-forward layer four times as wide as the model."""
    run = metro_tiny()
    return resolve(
        replace(
            run,
            model=replace(
                run.model,
                encoder_num_layers=workload.num_layers,
                decoder_num_layers=workload.num_layers,
                generator_num_layers=workload.generator_num_layers,
                hidden_size=workload.hidden_size,
                ffn_hidden_size=4 * workload.hidden_size,
                num_attention_heads=max(1, workload.hidden_size // 64),
                vocab_size=workload.vocab_size,
                hidden_dropout=workload.dropout,
                attention_dropout=workload.dropout,
            ),
            data=replace(run.data, encoder_seq_length=workload.seq_length),
            training=replace(
                run.training, micro_batch_size=workload.micro_batch_size, global_batch_size=workload.micro_batch_size
            ),
        ),
        world_size=1,
    )


def t5_run(workload: Workload) -> RunConfig:
    """T5's span corruption of the same text with the same main model: 256 tokens become 231 and 52."""
    run = metro_run(workload)
    raw_length, noise = workload.seq_length, round(workload.seq_length * run.objective.mask_prob)
    encoder_length = raw_length - noise + round(noise / run.objective.mean_noise_span_length)
    return resolve(
        replace(
            run,
            model=main_model(run.model),
            objective=replace(run.objective, objective="t5-span"),
            data=replace(run.data, encoder_seq_length=encoder_length, decoder_seq_length=None),
        ),
        world_size=1,
    )


def draw_microbatch(run: RunConfig) -> Microbatch:
    """One microbatch of uniformly drawn tokens, corrupted as the run's objective does."""
    vocabulary = _vocabulary(run)
    objective = build_objective(run.objective, run.data, vocabulary)
    b = run.training.micro_batch_size
    generator = np.random.default_rng(run.training.seed)
    tokens = generator.integers(vocabulary.mask_id + 1, vocabulary.num_pieces, (b, objective.raw_length))
    keys = BlockKeys(
        seed=run.training.seed,
        identity=np.zeros(b, dtype=np.uint64),
        epoch=np.zeros(b, dtype=np.int64),
        block=np.arange(b),
    )
    return objective.make_batch(Blocks(tokens=tokens, lengths=np.full(b, objective.raw_length), keys=keys))


def build_step(run: RunConfig, groups: ParallelGroups) -> Step:
    """Our full training step on one process: forward, backward, gradient reduction and optimizer update."""
    engine = Engine(run, single_piece(build_chain(run.model)), groups, torch.float32, pad_id=_vocabulary(run).pad_id)
    set_learning_rate(engine.optimizer, run.optimizer.lr)
    microbatch = draw_microbatch(run)
    return lambda: engine.train_step([microbatch])


def measure_gemm() -> float:
    """FLOP/s of the best of ten 1024 x 1024 x 1024 FP32 products, with the threads of this process."""
    a, b = torch.rand(GEMM_SIZE, GEMM_SIZE), torch.rand(GEMM_SIZE, GEMM_SIZE)
    best = min(_time(lambda: a @ b).processor for _ in range(GEMM_REPEATS + 1))  # the first one warms up
    return 2 * GEMM_SIZE**3 / best


def time_side_by_side(
    steps: Mapping[str, Step], num_rounds: int, num_warmups: int, report: Callable[[str], None]
) -> dict[str, list[Timing]]:
    """Times of every timed step of each contestant; all take one step per round."""
    timings: dict[str, list[Timing]] = {name: [] for name in steps}
    for number in range(num_warmups + num_rounds):
        taken = {name: _time(step) for name, step in steps.items()}
        kind = "warm-up" if number < num_warmups else "round"
        report(
            f"{kind} {number + 1}: " + ", ".join(f"{name} {timing.processor:.3f} s" for name, timing in taken.items())
        )
        if number >= num_warmups:
            for name, timing in taken.items():
                timings[name].append(timing)
    return timings


def summarise(seconds: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return {"median": median, "quartile_1": low, "quartile_3": high, "min": min(seconds), "max": max(seconds)}


def summarise_steps(
    workload: Workload, timings: Mapping[str, Sequence[Timing]], gemm_flops: Sequence[float]
) -> dict[str, Any]:
    """The benchmark's result from the times of "metro", "t5" and any peers, and the GEMM rates around them.

    `cpu_gemm_percent` counts METRO's minimal FLOPs against the best GEMM rate. Ratios are medians over rounds.
    `flops_ratio` is METRO over T5 as built, `minimal_flops_ratio` as identical mathematics needs.
    """
    seconds = {name: [timing.processor for timing in taken] for name, taken in timings.items()}
    metro_minimal, metro_built = _count_flops(metro_run(workload))
    t5_minimal, t5_built = _count_flops(t5_run(workload))
    sequences_per_second = workload.micro_batch_size / statistics.median(seconds["metro"])
    gemm = max(gemm_flops)
    ratios = {name: _median_ratio(values, seconds["metro"]) for name, values in seconds.items()}
    return {
        "cpu_gemm_percent": round(100 * sequences_per_second * metro_minimal / gemm, 2),
        "gemm_gflops": round(gemm / 1e9, 2),
        "seq_per_second": round(sequences_per_second, 3),
        "speedup_over_hf": round(ratios["hf"], 3) if "hf" in ratios else None,
        "speedup_over_hf_masked": round(ratios["hf_masked"], 3) if "hf_masked" in ratios else None,
        "metro_over_t5": round(1 / ratios["t5"], 3),
        "flops_ratio": round(metro_built / t5_built, 3),
        "minimal_flops_ratio": round(metro_minimal / t5_minimal, 3),
        "metro_gflops_per_sequence": round(metro_minimal / 1e9, 3),
        "t5_gflops_per_sequence": round(t5_minimal / 1e9, 3),
        "step_seconds": {name: summarise(values) for name, values in seconds.items()},
        "clock_over_processor": round(_median_clock_share(timings), 3),
        "gemm_gflops_before_and_after": [round(rate / 1e9, 2) for rate in gemm_flops],
        "num_threads": torch.get_num_threads(),
        "workload": {name: getattr(workload, name) for name in Workload.__slots__},
    }


def _vocabulary(run: RunConfig) -> Vocabulary:
    assert run.model.vocab_size is not None
    return Vocabulary(num_pieces=run.model.vocab_size - NUM_SENTINELS, num_sentinels=NUM_SENTINELS)


def _count_flops(run: RunConfig) -> tuple[float, float]:
    """FLOPs of one training sequence: the least that the mathematics needs, and as the model is built."""
    lengths = mean_lengths(run)
    return training_flops(run.model, lengths, minimal=True), training_flops(run.model, lengths)


def _median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(n / d for n, d in zip(numerators, denominators))


def _median_clock_share(timings: Mapping[str, Sequence[Timing]]) -> float:
    """1 where the process had its processor to itself."""
    return statistics.median(timing.clock / timing.processor for taken in timings.values() for timing in taken)


def _time(step: Step) -> Timing:
    clock, processor = time.perf_counter(), time.process_time()
    step()
    return Timing(processor=time.process_time() - processor, clock=time.perf_counter() - clock)
