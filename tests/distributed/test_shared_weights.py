"""Weights with copies on several stages and in several chunks of one rank: one gradient, one norm, equal to the bit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_metro.config.errors import MetroError
from megatron_metro.config.schema import ParallelConfig
from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.parity import Arrays, Case, worst_error

Pool = Callable[[int], WorkerPool]

TOKENS = "word_embeddings.weight"
POSITIONS_AND_NORM = {
    "encoder.embedding_norm.bias",
    "encoder.embedding_norm.weight",
    "encoder.position_embeddings.weight",
}
BIAS_TABLES = {f"{network}.relative_bias.weight" for network in ("generator", "encoder", "decoder")}
SHARES_ALL = {"generator_embedding_sharing": "token_pos_norm"}
PER_STACK = {"relative_attention": "per_stack", "relative_attention_decoder": True}


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one rank has after a few updates."""

    names: set[str]  # shared weights of which it holds a copy
    gradients: dict[str, list[bytes]]  # of every copy of a shared weight, after the sum over the copies
    whole: Arrays  # the model's gradients
    grad_norms: list[float]
    differing: list[str]
    tp_rank: int


def train_and_look(case: Case) -> Held:
    from tests.helpers.pipeline import build_engine, microbatches_of, whole_gradients

    engine = build_engine(case)
    engine.accumulate_gradients(microbatches_of(engine, case))
    whole = whole_gradients(engine)
    copies = {shared.name: shared.copies for shared in engine.shared._shared}
    gradients = {name: [copy.main_grad.numpy().tobytes() for copy in found] for name, found in copies.items()}
    norms = [engine.train_step(microbatches_of(engine, case, step)).outcome.grad_norm for step in range(case.num_steps)]
    engine.synchronise_parameters()
    return Held(
        names=set(copies),
        gradients=gradients,
        whole=whole,
        grad_norms=norms,
        differing=engine.shared.find_differing(),
        tp_rank=engine.groups.tp_rank,
    )


def make_case(layout: str, *, vpp: int = 2, tp: int = 1, sharded: bool = False, **model: Any) -> Case:
    pp = (layout.count("|") + 1) // vpp
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        pipeline_model_parallel_size=pp,
        num_virtual_stages_per_pipeline_rank=vpp,
        use_distributed_optimizer=sharded,
        overlap_grad_reduce=sharded,
        overlap_param_gather=sharded,
    )
    return Case(
        run=tiny.tiny_run(tiny.tiny_model(**model), parallel),
        micro_batch_size=3 if pp == 4 or tp > 1 else 1,
        dtype=torch.float32 if sharded else torch.float64,
        num_steps=2,
        layout=layout,
    )


# The token matrix is read by the units G, M, D and L; positions and embedding norm by G and M.
CASES = {
    "every piece": (make_case("Gg|gMe|eRDd|dL"), {TOKENS}),
    "every piece, distributed optimizer": (make_case("Gg|gMe|eRDd|dL", sharded=True), {TOKENS}),
    "four of eight pieces": (make_case("G|g|g|Me|e|RD|d|dL", **SHARES_ALL), {TOKENS} | POSITIONS_AND_NORM),
    "both chunks of one rank": (make_case("Gg|g|Mee|RDddL", **SHARES_ALL), {TOKENS} | POSITIONS_AND_NORM),
    "both chunks of one rank, distributed optimizer": (
        make_case("Gg|g|Mee|RDddL", sharded=True, **SHARES_ALL),
        {TOKENS} | POSITIONS_AND_NORM,
    ),
    "bias tables of all stacks": (
        make_case("Gg|gMe|eRDd|dL", tp=2, **PER_STACK),
        {TOKENS} | BIAS_TABLES,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_copies_get_the_sum_of_all_gradients(name: str, pool: Pool, groups: ParallelGroups) -> None:
    case, shared = CASES[name]
    results: list[Held] = pool(4).run(train_and_look, case)
    alone = replace(case.run, parallel=ParallelConfig())
    expected = train_and_look(replace(case, run=alone, layout=None))
    tolerance = 1e-5 if case.dtype == torch.float32 else 1e-9
    assert set.union(*(result.names for result in results)) == shared and not expected.names
    assert worst_error(results[0].whole, expected.whole)[0] <= tolerance
    for result in results:
        assert result.differing == []
        assert result.grad_norms == pytest.approx(expected.grad_norms, rel=tolerance)
    for weight in shared:
        for tp_rank in {result.tp_rank for result in results}:
            copies = [result.gradients.get(weight, []) for result in results if result.tp_rank == tp_rank]
            assert len({gradient for held in copies for gradient in held}) == 1
        assert sum(len(held) for held in copies) >= 2


def break_a_copy(case: Case, change: str) -> tuple[int, list[str], str, str]:
    """Change one number of the last copy, in the first replica; what the check and the training loop say of it."""
    from megatron_metro.training.loop import Trainer
    from tests.helpers.pipeline import build_engine

    engine = build_engine(case)
    (tokens,) = (shared for shared in engine.shared._shared if shared.name == TOKENS)
    for copy in tokens.copies:
        copy.data[5, 3] = 0.0
    assert engine.shared.find_differing() == []
    if engine.groups.dp_rank == 0 and engine.groups.pp_rank == engine.groups.pp_size - 1:
        number = tokens.copies[-1].data[5, 3:4]
        if change == "sign of zero":
            number.neg_()
        else:
            number.view(torch.int64).bitwise_xor_(1)

    def say(iteration: int) -> str:
        trainer = SimpleNamespace(run=case.run, engine=engine, state=SimpleNamespace(iteration=iteration))
        try:
            Trainer._check_shared_weights(trainer)  # type: ignore[arg-type]
        except MetroError as error:
            return str(error)
        return ""

    return engine.groups.dp_rank, engine.shared.find_differing(), say(4), say(5)


@pytest.mark.parametrize("change", ["lowest bit", "sign of zero"])
def test_one_changed_bit_is_found_and_ends_the_run(change: str, pool: Pool) -> None:
    case = make_case("Gg|gMe|eRDd|dL")
    run = replace(case.run, parallel=replace(case.run.parallel, check_weight_sharing_interval=2))
    for dp_rank, differing, when_due, between in pool(4).run(break_a_copy, replace(case, run=run), change):
        assert differing == ([TOKENS] if dp_rank == 0 else [])
        assert bool(when_due) == (dp_rank == 0) and not between
        if when_due:
            assert when_due.startswith("--check-weight-sharing-interval: at iteration 4 ") and TOKENS in when_due
            assert "\n" not in when_due
