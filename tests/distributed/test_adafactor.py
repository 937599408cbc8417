"""Adafactor: one process moves weights as torch does, every layout as one process, and its state moves between them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_metro.config.schema import OptimizerConfig
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.training.adafactor import Adafactor, Part, assign_owners
from megatron_metro.training.engine import Engine
from megatron_metro.training.model_space import tensors_to_save
from megatron_metro.training.optimizer import optimizer_step, set_learning_rate
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.layouts import Row
from tests.helpers.parity import (
    Arrays,
    Case,
    Outcome,
    _gather,
    _parameters,
    local_noise,
    run_case,
    worst_error,
    worst_metric_error,
)
from tests.helpers.pipeline import build_engine, microbatches_of
from tests.helpers.resuming import LAST_STEP, Stretch, check_continuation, go_on, make_case, run_on, save_early, train

Pool = Callable[[int], WorkerPool]

# Key biases have no gradient but noise, which the second moment would blow up to full updates; epsilon is above it.
# test_adafactor_precision.py shows that it hides nothing else, and has T5 with its own epsilon.
OPTIMIZER = {"optimizer": "adafactor", "lr": 1e-2, "adafactor_eps1": 1e-5}
T5 = {**tiny.T5_V1_1, "kv_channels": 6}
NUM_STEPS = 40


def unfuse(name: str, tensor: torch.Tensor, engine: Engine) -> list[torch.Tensor]:
    """The matrices of a one-process parameter that T5 keeps apart, without padded rows."""
    model = engine.run.model
    if "linear_qkv" in name or "linear_kv" in name:
        by_head = tensor.view(model.num_attention_heads, -1, model.head_size, *tensor.shape[1:])
        return [by_head[:, index].flatten(0, 1) for index in range(by_head.shape[1])]
    if "linear_fc1" in name and model.activation == "gated-gelu":
        return list(tensor.chunk(2))
    return [tensor[: tiny.VOCAB_SIZE] if tensor.shape[0] > tiny.VOCAB_SIZE else tensor]


def gradients(engine: Engine, step: int) -> Iterator[tuple[str, torch.nn.Parameter, torch.Tensor]]:
    """Random gradients of unequal rows; none of padded rows."""
    for index, (name, parameter) in enumerate(_parameters(engine).items()):
        generator = torch.Generator().manual_seed(1000 * step + index)
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        gradient *= 1e-2 * torch.rand(parameter.shape[:1], generator=generator).view(-1, *[1] * (parameter.dim() - 1))
        gradient[tiny.VOCAB_SIZE :] = 0.0
        yield name, parameter, gradient


@pytest.mark.parametrize("model", [{}, T5], ids=["metro", "t5"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_one_process_moves_weights_as_torch_does(groups: ParallelGroups, model: dict[str, Any], decay: float) -> None:
    """Forty updates with a rate that falls; queries, keys, values and gates are the reference's own matrices."""
    row = Row(model=model, spans=bool(model), optimizer={**OPTIMIZER, "weight_decay": decay, "clip_grad": 0.0})
    engine = build_engine(row.case())
    mine = {
        name: [part.clone() for part in unfuse(name, p.detach(), engine)] for name, p in _parameters(engine).items()
    }
    torchs = torch.optim.Adafactor([p for parts in mine.values() for p in parts], eps=(1e-5, 1e-3), weight_decay=decay)
    for step in range(NUM_STEPS):
        rate = 0.5 / (1 + step)
        for name, parameter, gradient in gradients(engine, step):
            parameter.main_grad.copy_(gradient)
            for part, part_gradient in zip(mine[name], unfuse(name, gradient, engine), strict=True):
                part.grad = part_gradient
        set_learning_rate(engine.optimizer, rate)
        torchs.param_groups[0]["lr"] = rate
        assert optimizer_step(engine.optimizer).updated
        torchs.step()
    for name, parameter in _parameters(engine).items():
        for found, expected in zip(unfuse(name, parameter.detach(), engine), mine[name], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13, msg=name)
        assert not parameter[tiny.VOCAB_SIZE :].any()


@pytest.mark.parametrize("shape", [(), (7,), (5, 3)])
def test_scalars_vectors_and_matrices(groups: ParallelGroups, shape: tuple[int, ...]) -> None:
    config = OptimizerConfig(
        weight_decay=0.0, adafactor_decay_rate=0.7, adafactor_eps2=0.1, adafactor_clip_threshold=2.0
    )
    start = torch.randn(shape, dtype=torch.float64)
    mine, torchs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    rows, columns = (*shape, 1, 1)[:2]
    part = Part(
        num_matrices=1,
        rows_per_block=rows,
        num_rows=rows,
        matrix_rows=rows,
        matrix_columns=columns,
        is_factored=len(shape) == 2,
        sharded_dim=None,
        owner=0,
    )
    found = Adafactor([mine], [part], config, groups)
    found.param_groups[0]["lr"] = 1e-2
    expected = torch.optim.Adafactor([torchs], lr=1e-2, beta2_decay=-0.7, eps=(1e-15, 0.1), d=2.0)
    for _ in range(NUM_STEPS):
        mine.grad = torch.randn(shape, dtype=torch.float64)
        torchs.grad = mine.grad.clone()
        found.step()
        expected.step()
    torch.testing.assert_close(mine, torchs, rtol=1e-12, atol=1e-14)


def test_the_step_may_follow_the_rate_alone(groups: ParallelGroups) -> None:
    """Without the relative step and the scale, the first update of a vector is the rate times the gradient's signs."""
    config = OptimizerConfig(weight_decay=0.0, adafactor_relative_step=False, adafactor_scale_parameter=False)
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    part = Part(
        num_matrices=1,
        rows_per_block=3,
        num_rows=3,
        matrix_rows=3,
        matrix_columns=1,
        is_factored=False,
        sharded_dim=None,
        owner=0,
    )
    optimizer = Adafactor([parameter], [part], config, groups)
    optimizer.param_groups[0]["lr"] = 7.0
    parameter.grad = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([-7.0, 7.0, 0.0], dtype=torch.float64))


def test_zero_gradients_move_nothing_even_in_single_precision(groups: ParallelGroups) -> None:
    engine = build_engine(Row(single_precision=True, optimizer={"optimizer": "adafactor", "weight_decay": 0.0}).case())
    before = {name: parameter.detach().clone() for name, parameter in _parameters(engine).items()}
    for parameter in _parameters(engine).values():
        parameter.main_grad.zero_()
    assert optimizer_step(engine.optimizer).updated
    for name, parameter in _parameters(engine).items():
        assert torch.equal(parameter, before[name]), name


def test_every_rank_gets_a_like_share_and_copies_one_owner() -> None:
    rng = np.random.default_rng(0)
    listed = [(f"w{i}", int(size), False) for i, size in enumerate(rng.integers(1, 1000, 200))]
    shared = [("word_embeddings.weight", 5000, True)]
    owners = assign_owners(listed + shared, 4)
    loads = [sum(size for (_, size, _), o in zip(listed + shared, owners) if o == rank) for rank in range(4)]
    assert max(loads) - min(loads) <= 1000
    assert assign_owners(shared + listed[:3], 4)[0] == owners[-1]


PLACES = [Row(dp=2), Row(tp=2, sp=True), Row(pp=2), Row(pp=2, vpp=2)]
PLACES += [Row(dp=4, micro_batch_size=1), Row(tp=2, dp=2), Row(tp=4, sp=True), Row(tp=2, sp=True, pp=2, vpp=2)]
METRO = {"optimizer": OPTIMIZER}
GATED = {"optimizer": OPTIMIZER, "spans": True, "model": T5, "model_name": "t5"}
SINGLE = {"optimizer": {**OPTIMIZER, "adafactor_eps1": 3e-2, "lr": 0.3}, "single_precision": True}
ROWS = [replace(place, **METRO, num_steps=3) for place in PLACES]
ROWS += [replace(place, **GATED, num_steps=3) for place in (PLACES[1], PLACES[3], PLACES[5])]
ROWS += [replace(place, **SINGLE) for place in PLACES[:3]]


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    """One-process runs, computed when first needed."""
    return {}


def find_reference(row: Row, references: dict[str, Any], function: Callable[..., Any], *arguments: Any) -> Any:
    key = f"{function.__name__} {row.reference_key()}"
    if key not in references:
        references[key] = function(row.reference(), *arguments)
    return references[key]


def row_name(row: Row) -> str:
    return row.name.partition(" optimizer")[0]


def update_by_noise(case: Case, num_steps: int) -> Arrays | None:
    """What the optimizer makes of the same gradients in any layout: the updates of the whole model, from rank 0."""
    engine = build_engine(case)
    before = {name: parameter.detach().double() for name, parameter in _parameters(engine).items()}
    for step in range(num_steps):
        for piece in engine.pieces:
            for name, parameter in piece.named_parameters():
                parameter.main_grad.copy_(local_noise(engine, name, parameter, 1e-4, f" step {step}"))
        assert optimizer_step(engine.optimizer).updated
    assert engine.shared.find_differing() == []
    updates = _gather(engine, {n: p.detach().double() - before[n] for n, p in _parameters(engine).items()})
    return updates if engine.groups.rank == 0 else None


@pytest.mark.parametrize("row", PLACES[:3], ids=row_name)
def test_single_precision_rounds_alike_everywhere(row: Row, pool: Pool, groups: ParallelGroups) -> None:
    """With the default epsilon and given gradients, which training in single precision knows to 1e-6 only."""
    optimizer = {"optimizer": "adafactor", "lr": 0.1}
    row = replace(row, single_precision=True, spans=True, model=T5, optimizer=optimizer)
    expected = update_by_noise(row.reference(), 10)
    found = run_on(pool, row, update_by_noise, 10)
    assert worst_error(found, expected)[0] <= 1e-5


@pytest.mark.parametrize("row", [Row(tp=2, sp=True), Row(dp=2)], ids=row_name)
def test_the_same_layout_goes_on_to_the_bit(row: Row, pool: Pool, groups: ParallelGroups, tmp_path: Path) -> None:
    row = replace(row, **SINGLE)
    whole: Stretch = run_on(pool, row, train, 0, LAST_STEP)
    run_on(pool, row, save_early, tmp_path)
    found: Stretch = run_on(pool, row, go_on, tmp_path)
    for name, weight in whole.weights.items():
        np.testing.assert_array_equal(found.weights[name], weight, err_msg=name)


def read_state_sizes(case: Case) -> tuple[int, int, float, float]:
    """After a step in BF16: numbers of state and of weights, what main and model weights differ by, sum of weights."""
    engine = build_engine(case)
    engine.train_step(microbatches_of(engine, case))
    parameters = list(_parameters(engine).values())
    found = sum(tensor.numel() for state in engine.optimizer.state.values() for tensor in state.values())
    difference = max(float((p.main_param.bfloat16() - p.detach()).abs().max()) for p in parameters)
    total = sum(float(p.main_param.double().sum()) for p in parameters)
    return found, sum(p.numel() for p in parameters), difference, total


def test_state_is_shared_out_and_replicas_stay_alike_in_bfloat16(pool: Pool, groups: ParallelGroups) -> None:
    row = Row(dp=2, optimizer={"optimizer": "adafactor", "bf16": True})
    first, second = pool(2).run(read_state_sizes, replace(row.case(), dtype=torch.bfloat16))
    alone = read_state_sizes(replace(row.reference(), dtype=torch.bfloat16))
    assert first[0] + second[0] == alone[0] < 0.2 * alone[1]
    assert first[0] > 0 and second[0] > 0
    assert first[2] == second[2] == 0.0 and first[3] == second[3]


def list_written(case: Case) -> list[tuple[str, tuple[int, ...]]]:
    """Key and place of every piece of optimizer state that this rank writes."""
    engine = build_engine(case)
    pieces = tensors_to_save(engine.chunks, engine.optimizer, with_moments=True)
    return [(piece.key, piece.global_offset) for piece in pieces if "state" in piece.key and not any(piece.replica_id)]


@pytest.mark.parametrize("row", PLACES[:3], ids=row_name)
def test_every_piece_of_state_is_written_once(row: Row, pool: Pool, groups: ParallelGroups) -> None:
    written = [piece for pieces in pool(2).run(list_written, make_case(replace(row, **GATED))) for piece in pieces]
    assert len(set(written)) == len(written)
    assert {key for key, _ in written} == {key for key, _ in list_written(replace(row, **GATED).reference())}


MOVES = [
    (Row(tp=2, sp=True), Row(dp=2)),
    (Row(dp=2), Row(pp=2, vpp=2)),
    (Row(pp=2), Row(tp=2, sp=True)),
    (Row(tp=2, dp=2), Row()),
    (Row(), Row(tp=4, sp=True)),
]


@pytest.mark.parametrize(("saving", "loading"), MOVES, ids=row_name)
def test_a_run_moves_between_layouts(
    saving: Row, loading: Row, pool: Pool, groups: ParallelGroups, tmp_path: Path, references: dict[str, Any]
) -> None:
    for kind in (METRO, GATED):
        saving, loading, folder = replace(saving, **kind), replace(loading, **kind), tmp_path / str(kind is METRO)
        expected = find_reference(loading, references, train, 0, LAST_STEP)
        run_on(pool, saving, save_early, folder)
        check_continuation(run_on(pool, loading, go_on, folder), expected, loading.tolerance)


@pytest.mark.parametrize("row", sorted(ROWS, key=lambda row: -row.world_size), ids=row_name)
def test_layout_changes_nothing(row: Row, pool: Pool, groups: ParallelGroups, references: dict[str, Any]) -> None:
    expected: Outcome = find_reference(row, references, run_case)
    found: Outcome = pool(row.world_size).run(run_case, row.case())[0]
    assert worst_metric_error(found.metrics, expected.metrics) <= row.tolerance
    assert worst_error(found.updates, expected.updates)[0] <= row.tolerance
