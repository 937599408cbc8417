"""Dropout under tensor parallelism and recomputation: the same masks again in backward, the right ones on each rank."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.layouts import Row
from tests.helpers.parity import GLOBAL_BATCH_SIZE, Case, run_case, worst_error, worst_metric_error

Pool = Callable[[int], WorkerPool]

DROPOUTS = {"hidden_dropout": 0.3, "attention_dropout": 0.3, "generator_dropout": 0.2}
# Activations of another width than hidden states and attention rows, on a rank too.
T5 = {**tiny.SPACTOR, **DROPOUTS, "dropout_places": "t5", "ffn_hidden_size": 48}
MODELS: dict[str, dict[str, Any]] = {"metro": DROPOUTS, "t5": T5}


def make_case(name: str = "metro", **row: object) -> Case:
    return replace(Row(model=MODELS[name], **row).case(), num_steps=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "recompute"), [("metro", "selective"), ("metro", "full"), ("t5", "full")])
@pytest.mark.parametrize("sp", [False, True], ids=["tp2", "tp2sp"])
def test_recomputation_drops_the_same_entries(sp: bool, name: str, recompute: str, pool: Pool) -> None:
    kept, recomputed = (pool(2).run(run_case, make_case(name, tp=2, sp=sp, recompute=r))[0] for r in (None, recompute))
    assert worst_metric_error(recomputed.metrics, kept.metrics) <= 1e-12
    assert worst_error(recomputed.gradients, kept.gradients)[0] <= 1e-12
    assert worst_error(recomputed.updates, kept.updates)[0] <= 1e-9


def find_replicated_gradients(case: Case) -> dict[str, np.ndarray]:
    """Gradients of the weights that every tensor-parallel rank holds whole, after one step."""
    from tests.helpers.parity import local_microbatches
    from tests.helpers.pipeline import build_engine

    engine = build_engine(case)
    engine.accumulate_gradients(local_microbatches(case, 0, 0, 1))
    found = {
        name: parameter.main_grad.numpy().copy()
        for piece in engine.pieces
        for name, parameter in piece.named_parameters()
        if not getattr(parameter, "tensor_model_parallel", False)
    }
    engine.close()
    return found


def find_attention_masks(case: Case) -> list[np.ndarray]:
    """What dropout let through where attention and where hidden states are dropped, as this rank draws it."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_metro.device import activate
    from megatron_metro.parallel.groups import reinitialise

    groups = reinitialise(case.run.parallel)
    activate("cpu").seed_all(1, tp_rank=groups.tp_rank)
    import torch

    hidden = torch.nn.functional.dropout(torch.ones(64), 0.5).numpy()
    with get_cuda_rng_tracker().fork():
        attention = torch.nn.functional.dropout(torch.ones(64), 0.5).numpy()
    return [hidden, attention]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sp", [False, True], ids=["tp2", "tp2sp"])
def test_replicated_weights_get_one_gradient(sp: bool, name: str, pool: Pool) -> None:
    first, second = pool(2).run(find_replicated_gradients, make_case(name, tp=2, sp=sp))
    assert first.keys() == second.keys() and len(first) > 20
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_ranks_drop_hidden_states_alike_and_heads_apart(pool: Pool) -> None:
    (hidden, attention), (other_hidden, other_attention) = pool(2).run(find_attention_masks, make_case(tp=2))
    assert np.array_equal(hidden, other_hidden) and not np.array_equal(attention, other_attention)


def find_activation_masks(case: Case) -> list[np.ndarray]:
    """What dropout takes away of this rank's share of feed-forward activations, in order."""
    from torch import Tensor
    from torch.nn import functional

    from tests.helpers.mutations import replaced_attribute
    from tests.helpers.pipeline import build_engine, microbatches_of

    engine = build_engine(case)
    dropout, masks, width = functional.dropout, [], case.run.model.ffn_hidden_size // engine.groups.tp_size

    def drop_and_record(x: Tensor, *arguments: Any) -> Tensor:
        dropped: Tensor = dropout(x, *arguments)
        if x.shape[-1] == width:
            masks.append(((dropped == 0) & (x != 0)).numpy())
        return dropped

    with replaced_attribute(functional, "dropout", drop_and_record):
        engine.accumulate_gradients(microbatches_of(engine, case))
    return masks


def test_ranks_drop_their_own_activations(pool: Pool) -> None:
    case = make_case("t5", tp=2, micro_batch_size=GLOBAL_BATCH_SIZE)
    ranks = pool(2).run(find_activation_masks, case)
    assert [len(masks) for masks in ranks] == [
        4,
        4,
    ]  # two layers of encoder and decoder; generators have their own width
    assert all(first.any() and not np.array_equal(first, second) for first, second in zip(*ranks))
