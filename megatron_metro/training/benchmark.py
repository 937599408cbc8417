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
from torch import Tensor

from megatron_metro.analysis.cost import main_model, training_flops
from megatron_metro.batch import Microbatch
from megatron_metro.config.chain import build_chain
from megatron_metro.config.lengths import mean_lengths, static_lengths
from megatron_metro.config.presets import metro_tiny
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.validation import resolve, validate
from megatron_metro.data.blocks import Blocks
from megatron_metro.data.objectives import build_objective
from megatron_metro.data.randomness import BlockKeys
from megatron_metro.device import activate
from megatron_metro.parallel.groups import ParallelGroups, single_process
from megatron_metro.parallel.layout import single_piece
from megatron_metro.tokenizer import Vocabulary
from megatron_metro.training.engine import Engine
from megatron_metro.training.optimizer import set_learning_rate

NUM_THREADS = 1  # of every benchmark here: products of several threads on shared cores time the other work
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
    matmul_precision: str = "highest"  # another one runs METRO in both, side by side


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
    objective = build_objective(run, benchmark_vocabulary(run))
    return objective.make_batch(draw_blocks(run, run.training.micro_batch_size))


def draw_blocks(run: RunConfig, num_blocks: int) -> Blocks:
    """Uncorrupted blocks of uniformly drawn tokens, as long as the run's objective wants them."""
    vocabulary = benchmark_vocabulary(run)
    length = build_objective(run, vocabulary).raw_length
    generator = np.random.default_rng(run.training.seed)
    tokens = generator.integers(vocabulary.first_text_id, vocabulary.num_pieces, (num_blocks, length))
    keys = BlockKeys(
        seed=run.training.seed,
        identity=np.zeros(num_blocks, dtype=np.uint64),
        epoch=np.zeros(num_blocks, dtype=np.int64),
        block=np.arange(num_blocks),
    )
    return Blocks(tokens=tokens, lengths=np.full(num_blocks, length), keys=keys)


def build_step(run: RunConfig, groups: ParallelGroups) -> Step:
    """Our full training step on one process: forward, backward, gradient reduction and optimizer update.

    Raises ConfigError where the sizes do not make a model.
    """
    validate(run, world_size=1)
    engine = Engine(
        run, single_piece(build_chain(run.model)), groups, torch.float32, pad_id=benchmark_vocabulary(run).pad_id
    )
    set_learning_rate(engine.optimizer, run.optimizer.lr)
    microbatch = draw_microbatch(run)
    return lambda: engine.train_step([microbatch])


def start_process() -> ParallelGroups:
    """This process alone, on one thread of the CPU."""
    torch.set_num_threads(NUM_THREADS)
    return single_process(activate("cpu"))


def build_steps(workload: Workload) -> dict[str, Step]:
    """The steps of METRO and of T5, and of METRO in another precision of FP32 products where the workload names one."""
    groups = start_process()
    metro, precision = metro_run(workload), workload.matmul_precision
    steps = {"metro": build_step(metro, groups), "t5": build_step(t5_run(workload), groups)}
    if precision != "highest":
        steps[f"metro_{precision}"] = in_precision(precision, build_step(metro, groups))
    return steps


def in_precision(precision: str, step: Step) -> Step:
    """The same step with FP32 products in this precision; what runs after it is not touched."""

    def run() -> object:
        torch.set_float32_matmul_precision(precision)
        try:
            return step()
        finally:
            torch.set_float32_matmul_precision("highest")

    return run


def measure_gemm(precision: str = "highest") -> float:
    """FLOP/s of the best of ten 1024 x 1024 x 1024 FP32 products, with the threads of this process."""
    a, b = torch.rand(GEMM_SIZE, GEMM_SIZE), torch.rand(GEMM_SIZE, GEMM_SIZE)
    product = in_precision(precision, lambda: a @ b)
    best = min(time_call(product).processor for _ in range(GEMM_REPEATS + 1))  # the first one warms up
    return 2 * GEMM_SIZE**3 / best


def measure_gemm_error(precision: str) -> float:
    """Largest error of a 1024 x 1024 x 1024 FP32 product, relative to its largest entry."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, generator=generator) for _ in range(2))
    products: list[Tensor] = []
    in_precision(precision, lambda: products.append(a @ b))()
    exact = a.double() @ b.double()
    return float((products[0] - exact).abs().max() / exact.abs().max())


def time_side_by_side(
    steps: Mapping[str, Step], num_rounds: int, num_warmups: int, report: Callable[[str], None]
) -> dict[str, list[Timing]]:
    """Times of every timed step of each contestant; all take one step per round."""
    timings: dict[str, list[Timing]] = {name: [] for name in steps}
    for number in range(num_warmups + num_rounds):
        taken = {name: time_call(step) for name, step in steps.items()}
        kind = "warm-up" if number < num_warmups else "round"
        report(
            f"{kind} {number + 1}: " + ", ".join(f"{name} {timing.processor:.3f} s" for name, timing in taken.items())
        )
        if number >= num_warmups:
            for name, timing in taken.items():
                timings[name].append(timing)
    return timings


def compare_steps(
    workload: Workload, steps: Mapping[str, Step], num_rounds: int, num_warmups: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """Time "metro", "t5" and any peers between two measurements of the GEMM rate; the benchmark's result."""
    before = measure_gemm()
    report(f"GEMM: {before / 1e9:.1f} GFLOP/s")
    timings = time_side_by_side(steps, num_rounds, num_warmups, report)
    result = summarise_steps(workload, timings, [before, measure_gemm()])
    precision = workload.matmul_precision
    if precision != "highest":
        result["matmul_precision"] = {
            "speedup": round(1 / result["step_seconds_over_metro"][f"metro_{precision}"], 3),
            "gemm_gflops": round(measure_gemm(precision) / 1e9, 2),
            "gemm_error": measure_gemm_error(precision),
            "gemm_error_of_highest": measure_gemm_error("highest"),
        }
    return result


def summarise(seconds: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return {"median": median, "quartile_1": low, "quartile_3": high, "min": min(seconds), "max": max(seconds)}


def summarise_steps(
    workload: Workload, timings: Mapping[str, Sequence[Timing]], gemm_flops: Sequence[float]
) -> dict[str, Any]:
    """The benchmark's result from the times of "metro", "t5" and any peers, and the GEMM rates around them.

    `cpu_gemm_percent` counts METRO's minimal FLOPs against the best GEMM rate. Ratios are medians over rounds.
    `flops_ratio` is METRO over T5 with the slots that are built, `minimal_flops_ratio` with the mean masked count.
    """
    seconds = {name: [timing.processor for timing in taken] for name, taken in timings.items()}
    metro, t5 = metro_run(workload), t5_run(workload)
    metro_flops, t5_flops = (training_flops(run.model, mean_lengths(run)) for run in (metro, t5))
    metro_built, t5_built = (training_flops(run.model, static_lengths(run)) for run in (metro, t5))
    sequences_per_second = workload.micro_batch_size / statistics.median(seconds["metro"])
    gemm = max(gemm_flops)
    ratios = {name: _median_ratio(values, seconds["metro"]) for name, values in seconds.items()}
    return {
        "cpu_gemm_percent": round(100 * sequences_per_second * metro_flops / gemm, 2),
        "gemm_gflops": round(gemm / 1e9, 2),
        "seq_per_second": round(sequences_per_second, 3),
        "speedup_over_hf": round(ratios["hf"], 3) if "hf" in ratios else None,
        "speedup_over_hf_masked": round(ratios["hf_masked"], 3) if "hf_masked" in ratios else None,
        "metro_over_t5": round(1 / ratios["t5"], 3),
        "flops_ratio": round(metro_built / t5_built, 3),
        "minimal_flops_ratio": round(metro_flops / t5_flops, 3),
        "metro_over_t5_over_flops_ratio": round(t5_built / metro_built / ratios["t5"], 3),
        "metro_gflops_per_sequence": round(metro_flops / 1e9, 3),
        "t5_gflops_per_sequence": round(t5_flops / 1e9, 3),
        "step_seconds": {name: summarise(values) for name, values in seconds.items()},
        "step_seconds_over_metro": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "clock_over_processor": round(_median_clock_share(timings), 3),
        "gemm_gflops_before_and_after": [round(rate / 1e9, 2) for rate in gemm_flops],
        "num_threads": torch.get_num_threads(),
        "workload": {name: getattr(workload, name) for name in Workload.__slots__},
    }


def benchmark_vocabulary(run: RunConfig) -> Vocabulary:
    """What objectives need to know of a tokenizer that does not exist."""
    assert run.model.vocab_size is not None
    return Vocabulary(num_pieces=run.model.vocab_size - NUM_SENTINELS, num_sentinels=NUM_SENTINELS)


def _median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(n / d for n, d in zip(numerators, denominators))


def _median_clock_share(timings: Mapping[str, Sequence[Timing]]) -> float:
    """1 where the process had its processor to itself."""
    return statistics.median(timing.clock / timing.processor for taken in timings.values() for timing in taken)


def time_call(step: Step) -> Timing:
    """Seconds of one call."""
    clock, processor = time.perf_counter(), time.process_time()
    step()
    return Timing(processor=time.process_time() - processor, clock=time.perf_counter() - clock)
