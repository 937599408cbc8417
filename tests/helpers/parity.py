"""The same training steps under any layout, gathered into whole tensors: what the parity matrix compares.

Judged as design section 5 says: error of a tensor = max|a - b| / max(max|b|, 1e-3 x the largest such entry of the
model); every weight is first moved by N(0, 0.05), since zero-initialised heads and tables hide missing gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist

from megatron_metro.batch import Microbatch
from megatron_metro.config.chain import build_chain
from megatron_metro.config.schema import RunConfig
from megatron_metro.device import activate
from megatron_metro.model.weights import count_parts, has_vocabulary_rows
from megatron_metro.parallel.groups import reinitialise
from megatron_metro.parallel.layout import StageLayout, parse
from megatron_metro.training.engine import Engine
from megatron_metro.training.optimizer import set_learning_rate
from tests.helpers import tiny
from tests.helpers.objective_cases import made_batch
from tests.helpers.pair_cases import pair_batch

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: a configuration, a cut of the chain, and how the global batch is divided."""

    run: RunConfig
    micro_batch_size: int = 2
    dtype: torch.dtype = torch.float64
    num_steps: int = 5
    padded: bool = False
    spans: bool = False
    made: bool = False
    pairs: Literal["padded", "packed"] | None = None  # examples of fine-tuning, one a row or several
    few_ids: bool = False
    keeps_logits: bool = False
    layout: str | None = None  # pieces by hand, in the string form of --pipeline-model-parallel-layout
    mutate: Callable[[Engine], AbstractContextManager[None]] | None = None  # breaks something on purpose


@dataclass
class Outcome:
    """What one run did, in whole tensors by parameter name."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    sampled_ids: np.ndarray | None = None  # [global batch, slots] of the first forward pass
    logits: np.ndarray | None = None  # [global batch x target slots, vocabulary] of the first forward pass, if kept
    norms: list[float] = field(default_factory=list)
    weights: Arrays = field(default_factory=dict)  # before the first step
    gradients: Arrays = field(default_factory=dict)  # of the first step, before clipping
    updates: Arrays = field(default_factory=dict)  # weights after all steps minus weights before


GLOBAL_BATCH_SIZE = 12


def run_case(case: Case) -> Outcome | None:
    """Run a case on all processes of a pool; rank 0 returns the outcome."""
    groups = reinitialise(case.run.parallel)
    activate("cpu").seed_all(1, tp_rank=groups.tp_rank)
    engine = Engine(case.run, _build_layout(case.run, case.layout), groups, case.dtype, pad_id=tiny.PAD_ID)
    perturb(engine)
    if case.few_ids:
        tiny.prefer_few_ids(engine.pieces, groups.tp_rank)
    set_learning_rate(engine.optimizer, case.run.optimizer.lr)
    try:
        with case.mutate(engine) if case.mutate is not None else nullcontext():
            outcome = _run_steps(case, engine)
    finally:
        engine.close()
    return outcome if groups.rank == 0 else None


def _run_steps(case: Case, engine: Engine) -> Outcome:
    groups, outcome = engine.groups, Outcome()
    before = {name: parameter.detach().double().clone() for name, parameter in _parameters(engine).items()}
    outcome.weights = _gather(engine, before)
    with _recording_samples(engine) as samples, _recording_logits(engine, case) as logits:
        engine.accumulate_gradients(local_microbatches(case, 0, groups.dp_rank, groups.dp_size))
    outcome.sampled_ids = _gather_samples(engine, samples)
    outcome.logits = _gather_logits(engine, logits) if case.keeps_logits else None
    if not case.run.parallel.use_distributed_optimizer:  # under it a rank holds only a slice of each gradient
        outcome.gradients = _gather(engine, {n: p.main_grad.double() for n, p in _parameters(engine).items()})
    for step in range(case.num_steps):
        result = engine.train_step(local_microbatches(case, step, groups.dp_rank, groups.dp_size))
        outcome.metrics.append(result.metrics)
        outcome.norms.append(result.outcome.grad_norm)
    engine.synchronise_parameters()
    outcome.updates = _gather(engine, {n: p.detach().double() - before[n] for n, p in _parameters(engine).items()})
    if case.mutate is None:
        assert engine.shared.find_differing() == [], "copies of shared weights have come apart"
    return outcome


@contextmanager
def _recording_samples(engine: Engine) -> Iterator[list[np.ndarray]]:
    """The generator's fills of every microbatch that this rank samples, in order."""
    recorded: list[np.ndarray] = []
    for piece in engine.pieces:
        if run := piece._run.get("mlm_head"):
            piece._run["mlm_head"] = partial(_run_and_record, run, recorded)
    try:
        yield recorded
    finally:
        for piece in engine.pieces:
            run = piece._run.get("mlm_head")
            if isinstance(run, partial):
                piece._run["mlm_head"] = run.args[0]


def _run_and_record(run: Callable[..., Any], recorded: list[np.ndarray], *arguments: Any) -> Any:
    running = run(*arguments)
    recorded.append(running.payload.sampled_ids.numpy())
    return running


@contextmanager
def _recording_logits(engine: Engine, case: Case) -> Iterator[list[np.ndarray]]:
    """This rank's columns of the LM head's logits, of every microbatch in order."""
    recorded: list[np.ndarray] = []
    last = engine.pieces[-1]
    if not (case.keeps_logits and last.units[-1].kind == "lm_head"):
        yield recorded
        return
    project = last._project

    def project_and_record(rows_RH: torch.Tensor) -> torch.Tensor:
        logits = project(rows_RH)
        recorded.append(logits.detach().numpy())
        return logits

    last._project = project_and_record
    try:
        yield recorded
    finally:
        del last._project


def _gather_logits(engine: Engine, local: list[np.ndarray]) -> np.ndarray:
    """The logits of the first data-parallel replica: every rank's columns, without padding."""
    groups = engine.groups
    everything: list[tuple[int, int, list[np.ndarray]]] = [(0, 0, [])] * groups.world_size
    dist.all_gather_object(everything, (groups.dp_rank, groups.tp_rank, local))
    columns = [np.concatenate(shard) for dp_rank, _, shard in sorted(everything, key=lambda e: e[:2]) if shard]
    return np.concatenate(columns[: groups.tp_size], axis=1)[:, : tiny.VOCAB_SIZE]


def _gather_samples(engine: Engine, samples: list[np.ndarray]) -> np.ndarray | None:
    """All fills in the order of the global batch, after checking that tensor-parallel ranks drew the same."""
    everything: list[tuple[int, list[np.ndarray]]] = [(0, [])] * engine.groups.world_size
    dist.all_gather_object(everything, (engine.groups.dp_rank, samples))
    by_replica: dict[int, list[np.ndarray]] = {}
    for dp_rank, arrays in everything:
        if arrays:
            known = by_replica.setdefault(dp_rank, arrays)
            assert all(np.array_equal(a, b) for a, b in zip(known, arrays, strict=True)), "ranks sampled differently"
    if not by_replica:
        return None
    return np.concatenate([by_replica[r][j] for j in range(len(by_replica[0])) for r in sorted(by_replica)])


def _build_layout(run: RunConfig, text: str | None) -> StageLayout:
    chain = build_chain(run.model)
    pp, vpp = run.parallel.pipeline_model_parallel_size, run.parallel.num_virtual_stages_per_pipeline_rank
    if text is not None:
        return parse(text, chain, pp, vpp)
    bounds = [round(i * len(chain) / (pp * vpp)) for i in range(pp * vpp + 1)]
    pieces = tuple(chain[start:end] for start, end in pairwise(bounds))
    return StageLayout(pieces=pieces, pp_size=pp, vpp_size=vpp)


def local_microbatches(case: Case, step: int, dp_rank: int, dp_size: int) -> list[Microbatch]:
    """This rank's share of the step's global batch, which is the same for every layout."""
    size, whole = case.micro_batch_size, _global_batch(case, 100 + step)
    num_sequences = len(whole.encoder_tokens)
    count, left = divmod(num_sequences, size * dp_size)
    assert left == 0, f"{dp_size} replicas cannot share {num_sequences} sequences in microbatches of {size}"
    starts = [(j * dp_size + dp_rank) * size for j in range(count)]
    return [_rows(whole, start, start + size) for start in starts]


def _global_batch(case: Case, seed: int) -> Microbatch:
    run = case.run
    if case.pairs is not None:
        return pair_batch(run.model, seed, is_packed=case.pairs == "packed")
    if case.made:
        return made_batch(run, GLOBAL_BATCH_SIZE, seed)
    if case.spans:
        return tiny.span_batch(GLOBAL_BATCH_SIZE, seed)
    batch = tiny.objective_batch(
        run.objective, GLOBAL_BATCH_SIZE, seed, padded=case.padded, has_decoder=run.model.has_decoder
    )
    return tiny.narrow(batch) if case.few_ids else batch


def _rows(batch: Microbatch, start: int, stop: int) -> Microbatch:
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{name: value[start:stop] for name, value in values.items() if value is not None})


def _parameters(engine: Engine) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by name; of a weight shared by several chunks, the first copy."""
    found: dict[str, torch.nn.Parameter] = {}
    for piece in engine.pieces:
        for name, parameter in piece.named_parameters():
            found.setdefault(name, parameter)
    return found


@torch.no_grad()
def perturb(engine: Engine, scale: float = 0.05) -> None:
    """Add N(0, scale) to every weight, as a function of its name alone; padded vocabulary rows stay as they are."""
    for piece in engine.pieces:
        for name, parameter in piece.named_parameters():
            parameter.add_(local_noise(engine, name, parameter, scale).to(parameter.dtype))
    engine.optimizer.reload_model_params()


def local_noise(engine: Engine, name: str, parameter: torch.Tensor, scale: float, seed: str = "") -> torch.Tensor:
    """This rank's part of a whole tensor of N(0, scale), a function of name and seed; zero in padded rows."""
    groups = engine.groups
    dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
    shape = list(parameter.shape)
    if dim is not None:
        shape[dim] *= groups.tp_size
    rows = tiny.VOCAB_SIZE if has_vocabulary_rows(name) else shape[0]
    noise = np.zeros(shape)
    noise[:rows] = np.random.default_rng(crc32((name + seed).encode())).normal(0, scale, [rows, *shape[1:]])
    if dim is not None:
        parts = np.split(noise, count_parts(name, engine.run.model), dim)
        noise = np.concatenate([np.split(part, groups.tp_size, dim)[groups.tp_rank] for part in parts], dim)
    return torch.from_numpy(noise)


def _gather(engine: Engine, local: dict[str, torch.Tensor]) -> Arrays:
    """Whole tensors by name, from the first data-parallel replica of all stages; padded vocabulary rows cut off."""
    groups = engine.groups
    parameters = _parameters(engine)
    mine = {
        name: (tensor.cpu().numpy(), getattr(parameters[name], "partition_dim", -1)) for name, tensor in local.items()
    }
    everything: list[tuple[int, int, int, dict[str, tuple[np.ndarray, int]]]] = [(0, 0, 0, {})] * groups.world_size
    dist.all_gather_object(everything, (groups.dp_rank, groups.pp_rank, groups.tp_rank, mine))
    whole: Arrays = {}
    for dp_rank, pp_rank, tp_rank, tensors in sorted(everything, key=lambda entry: entry[:3]):
        if dp_rank != 0 or tp_rank != 0:
            continue
        for name, (_, dim) in tensors.items():
            shards = [t[name][0] for d, p, _, t in sorted(everything, key=lambda e: e[:3]) if (d, p) == (0, pp_rank)]
            joined = shards[0]
            if dim >= 0:  # of a weight of several parts, a rank holds its share of each
                parts = [np.split(shard, count_parts(name, engine.run.model), dim) for shard in shards]
                joined = np.concatenate([shard for part in zip(*parts, strict=True) for shard in part], dim)
            if has_vocabulary_rows(name):
                joined = joined[: tiny.VOCAB_SIZE]
            whole.setdefault(name, joined)
    return whole


def worst_error(found: Arrays, expected: Arrays) -> tuple[float, str]:
    """The largest error of any tensor and its name (design section 5)."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    largest = max(float(np.abs(array).max()) for array in expected.values())
    errors = {
        name: float(np.abs(found[name] - array).max()) / max(float(np.abs(array).max()), 1e-3 * largest)
        for name, array in expected.items()
    }
    name = max(errors, key=lambda key: errors[key])
    return errors[name], name


def worst_metric_error(found: Sequence[dict[str, float]], expected: Sequence[dict[str, float]]) -> float:
    """The largest relative difference of any logged number of any step."""
    return max(
        abs(a[name] - value) / max(abs(value), 1e-6)
        for a, b in zip(found, expected, strict=True)
        for name, value in b.items()
    )
