"""No weight is read before its module has been called.

megatron-core gathers updated parameters while the step goes on, and waits for them in forward pre-hooks on module
calls: a weight that is read past its module's call may still be an old one. Here every weight is unreadable (NaN) until
the module that owns it is called for the first time, in layouts that part what usually stands together.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tests.helpers.distributed import WorkerPool
from tests.helpers.layouts import Row

Pool = Callable[[int], WorkerPool]

PER_STACK = {"relative_attention": "per_stack", "relative_attention_decoder": True}
PRE_NORM = {"norm_placement": "pre", "normalization": "RMSNorm", "position_embedding_type": "none"}
SHARED_POSITIONS = {"generator_embedding_sharing": "token_pos_norm"}
UNTIED = {"untie_embeddings_and_output_weights": True}

ROWS = [
    Row(pp=2, layout="GggMeeRDdd|L"),
    Row(pp=2, layout="GggMeeRDdd|L", model=UNTIED),
    Row(pp=2, vpp=5, layout="G|g|g|M|e|e|R|D|d|dL"),
    Row(pp=2, vpp=5, layout="G|g|g|M|e|eR|D|d|d|L", model=SHARED_POSITIONS),
    Row(pp=2, vpp=2, layout="GggM|eeR|Ddd|L", model={**PER_STACK, **PRE_NORM}),
    Row(pp=2, layout="Gg|gMeeRDddL", recompute="full", padded=True),
    Row(tp=2, sp=True, recompute="selective"),
    Row(dp=2, distributed_optimizer=True, overlap=True, model={"mlm_head": "linear", "rtd_head": "simple"}),
    Row(pp=4, vpp=2, layout="G|gg|M|e|eR|D|dd|L", micro_batch_size=3),
    Row(tp=2, sp=True, pp=2, layout="GggMeeRDdd|L"),
]


@contextmanager
def unreadable_until_called(pieces: list[nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Hide the weights of every module that owns some; those still hidden, by name."""
    hidden: dict[str, nn.Module] = {}
    handles = []
    for number, piece in enumerate(pieces):
        for name, module in piece.named_modules():
            if not (weights := list(module.parameters(recurse=False))):
                continue
            key = f"piece {number}: {name}"
            hidden[key] = module
            values = [weight.detach().clone() for weight in weights]
            handles.append(module.register_forward_pre_hook(_show_once(hidden, key, weights, values)))
            for weight in weights:
                weight.data.fill_(float("nan"))
    yield hidden
    for handle in handles:
        handle.remove()


def _show_once(
    hidden: dict[str, nn.Module], key: str, weights: list[nn.Parameter], values: list[torch.Tensor]
) -> Callable[..., None]:
    def show(*_: object) -> None:
        if hidden.pop(key, None) is not None:
            for weight, value in zip(weights, values):
                weight.data.copy_(value)

    return show


def run_step(row: Row, read_early: bool) -> tuple[list[str], dict[str, float], dict[str, float]]:
    """Names of modules that no forward pass called, and the log of a step with hidden weights and of one without."""
    from tests.helpers.pipeline import build_engine, microbatches_of
    from tests.helpers.resuming import make_case

    case = make_case(row)
    engine = build_engine(case)
    microbatches = microbatches_of(engine, case)
    expected = engine.accumulate_gradients(microbatches)
    if read_early:
        _project_past_the_module(engine.pieces[-1])
    with unreadable_until_called(engine.pieces) as hidden:
        found = engine.accumulate_gradients(microbatches)
    return list(hidden), found, expected


def _project_past_the_module(piece: nn.Module) -> None:
    """The fault that was: the LM head reads the token matrix without calling it."""
    matrix = piece.word_embeddings
    piece._project = lambda rows: type(matrix).forward(matrix, rows, project=True)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_weights_are_read_by_calling_their_modules(row: Row, pool: Pool) -> None:
    for rank, (never_called, found, expected) in enumerate(pool(row.world_size).run(run_step, row, False)):
        assert never_called == [], f"rank {rank}"
        assert found == expected


def test_a_weight_read_past_its_module_is_found(pool: Pool) -> None:
    answers = pool(2).run(run_step, ROWS[0], True)
    assert answers[0][0] == []
    never_called, found, expected = answers[1]
    assert never_called == ["piece 0: word_embeddings"]
    assert found["lm loss"] != found["lm loss"] and expected["lm loss"] > 0.0
