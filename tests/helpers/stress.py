"""Short runs of pipelines drawn at random, and what each is compared with."""

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from megatron_metro.batch import Microbatch
from megatron_metro.config.chain import build_chain
from megatron_metro.config.schema import ModelConfig, ParallelConfig
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.parity import GLOBAL_BATCH_SIZE, Case
from tests.helpers.pipeline import FIRST_FILL, build_engine, fixed_fills, microbatches_of, random_cut

NUM_STEPS = 3
# Well above the rounding noise of gradients that are zero in theory, which Adam would turn into updates of full size.
ADAM_EPS = 1e-3
LOSSES = ("lm loss", "mlm loss", "rtd loss")
# Large weights: at small ones every prediction is close to uniform and a wrong message would hardly move a loss.
LARGE_WEIGHTS = {"init_method": "normal", "init_method_std": 0.3}
# How the two kinds of schedule take turns: half of all runs interleave two or three stages.
SHAPES = [(2, True), (3, True), (4, True), (2, False), (2, True), (3, True), (4, False), (3, False)]


@dataclass(frozen=True, kw_only=True)
class StressRun:
    """One draw."""

    number: int
    world_size: int
    case: Case

    @property
    def dtype(self) -> torch.dtype:
        return self.case.dtype

    @property
    def name(self) -> str:
        parallel, case = self.case.run.parallel, self.case
        pipeline = f"pp{parallel.pipeline_model_parallel_size}x{parallel.num_virtual_stages_per_pipeline_rank}"
        return f"{self.number:03d} {pipeline} {case.layout} {str(case.dtype).removeprefix('torch.')}"


def draw_stress_runs(count: int, seed: int) -> list[StressRun]:
    """So many runs, ordered by their number of processes."""
    runs = [_draw(number, random.Random(1000 * seed + number)) for number in range(count)]
    return sorted(runs, key=lambda run: -run.world_size)


def _draw(number: int, rng: random.Random) -> StressRun:
    pp, is_interleaved = SHAPES[number % len(SHAPES)]
    tp, dp = rng.choice([(1, 1), (2, 1), (1, 2)]) if pp == 2 else (1, 1)
    traits = rng.choice([_metro, _metro, _metro, _main_model, _t5])(rng)
    model: ModelConfig = tiny.tiny_model(**LARGE_WEIGHTS, **traits["model"])
    vpp = rng.randint(2, min(4, len(build_chain(model)) // pp)) if is_interleaved else 1
    sizes = [size for size in (1, 2, 3, 4, 6) if _is_possible(size, dp, pp if is_interleaved else 1)]
    layout = random_cut(rng, model, pp * vpp)
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1 and rng.random() < 0.8,
        pipeline_model_parallel_size=pp,
        num_virtual_stages_per_pipeline_rank=vpp,
        pipeline_model_parallel_layout=layout,
        use_distributed_optimizer=(is_sharded := rng.random() < 0.5),
        overlap_grad_reduce=(is_overlapped := rng.random() < 0.5),
        overlap_param_gather=is_sharded and is_overlapped,
        recompute_granularity=rng.choice([None, "selective", "full"]),  # type: ignore[arg-type]
    )
    is_bf16 = rng.random() < 0.5
    case = Case(
        run=tiny.tiny_run(model, parallel, adam_eps=ADAM_EPS, bf16=is_bf16),
        micro_batch_size=rng.choice(sizes),
        dtype=torch.bfloat16 if is_bf16 else torch.float32,
        num_steps=NUM_STEPS,
        padded=traits.get("padded", False),
        spans=traits.get("spans", False),
        layout=layout,
    )
    return StressRun(number=number, world_size=tp * pp * dp, case=case)


def _is_possible(micro_batch_size: int, dp: int, multiple: int) -> bool:
    count, rest = divmod(GLOBAL_BATCH_SIZE, micro_batch_size * dp)
    return rest == 0 and count > 0 and count % multiple == 0


def _depths(rng: random.Random) -> dict[str, Any]:
    return {f"{network}_num_layers": rng.randint(1, 4) for network in ("encoder", "decoder")}


def _metro(rng: random.Random) -> dict[str, Any]:
    model = {
        **_depths(rng),
        "generator_num_layers": rng.randint(1, 3),
        "generator_embedding_sharing": rng.choice(["token", "token_pos_norm"]),
        "rtd_head": rng.choice(["roberta", "simple"]),
    }
    return {"model": model, "padded": rng.random() < 0.3}


def _main_model(rng: random.Random) -> dict[str, Any]:
    """Encoder and decoder alone, with a shorter decoder."""
    return {
        "model": {**_depths(rng), "generator_num_layers": 0, "encoder_num_layers": rng.randint(4, 5)},
        "spans": True,
    }


def _t5(rng: random.Random) -> dict[str, Any]:
    """Pre-LN, no absolute positions, one bias table per stack; tied or not."""
    model = {
        **_depths(rng),
        "generator_num_layers": rng.choice([0, 2]),
        "encoder_num_layers": rng.randint(3, 5),
        "norm_placement": "pre",
        "normalization": "RMSNorm",
        "position_embedding_type": "none",
        "relative_attention": "per_stack",
        "relative_attention_decoder": True,
        "add_bias_linear": False,
        "activation": "gated-gelu",
        "untie_embeddings_and_output_weights": rng.random() < 0.5,
    }
    return {"model": model, "spans": model["generator_num_layers"] == 0}


def with_hits(microbatch: Microbatch) -> Microbatch:
    """Every third fill of `fixed_fills` right, so that the RTD loss depends on which id arrives where."""
    if microbatch.uniforms is None:
        return microbatch
    assert microbatch.masked_ids is not None
    right = (microbatch.masked_ids - FIRST_FILL + 0.5) / (tiny.VOCAB_SIZE - FIRST_FILL)
    is_hit = torch.arange(right.shape[1]) % 3 == 0
    return replace(microbatch, uniforms=torch.where(is_hit, right, microbatch.uniforms).clamp(min=0.0))


def run_steps(case: Case) -> list[dict[str, float]]:
    """Losses and gradient norm of a few steps; equal on all ranks."""
    engine = build_engine(case, scale=0.0)
    steps = []
    with fixed_fills():
        for step in range(case.num_steps):
            result = engine.train_step([with_hits(each) for each in microbatches_of(engine, case, step)])
            assert result.outcome.updated
            losses = {name: result.metrics[name] for name in LOSSES if name in result.metrics}
            steps.append({**losses, "norm": result.outcome.grad_norm})
    engine.synchronise_parameters()
    assert engine.shared.find_differing() == [], "copies of shared weights have come apart"
    return steps


def tolerances(case: Case, step: int) -> tuple[float, float]:
    """Relative differences allowed in losses and in the gradient norm.

    Up to the first update BF16 does the same arithmetic in any pipeline; only the gradients of shared weights are added
    up elsewhere. From then on, and under tensor parallelism, rounding differs.
    """
    if case.dtype == torch.float32:
        return 1e-5, 1e-4
    if step == 0 and case.run.parallel.tensor_model_parallel_size == 1:
        return 1e-6, 2e-3
    return 5e-2, 3e-1


def check_stress_run(drawn: StressRun, workers: WorkerPool) -> None:
    """On several processes as on one; a deadlock ends in the pool's time-out."""
    alone = replace(drawn.case.run, parallel=ParallelConfig())
    expected = run_steps(replace(drawn.case, run=alone, layout=None))
    for found in workers.run(run_steps, drawn.case, timeout=240.0):
        for step, values in enumerate(expected):
            assert found[step].keys() == values.keys()
            loss_tolerance, norm_tolerance = tolerances(drawn.case, step)
            for name, value in values.items():
                tolerance = norm_tolerance if name == "norm" else loss_tolerance
                assert found[step][name] == pytest.approx(value, rel=tolerance), f"{name} of step {step}"
