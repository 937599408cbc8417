"""Optimizer state moves between the Adams of torch, Transformer Engine and apex, which count updates elsewhere."""

from itertools import product

import pytest
import torch

from megatron_metro.config.schema import CheckpointConfig, OptimizerConfig, ParallelConfig
from megatron_metro.training.model_space import get_num_updates, set_num_updates
from tests.distributed.test_checkpoint import BF16, DP2, DP2_DISTRIBUTED, FP32, PP2, TP2, Run, load_and_go_on
from tests.helpers.fused_adam import KINDS, TransformerEngineAdam, installed_adam

PLACES = {
    "fp32": (DP2, FP32),
    "distributed": (DP2_DISTRIBUTED, FP32),
    "bf16-distributed": (DP2_DISTRIBUTED, BF16),
    "bf16": (PP2, BF16),
}


def save_with(kind: str, parallel: ParallelConfig, optimizer: OptimizerConfig, folder: str) -> None:
    with installed_adam(kind):
        run = Run(parallel, optimizer, CheckpointConfig(save=folder))
    assert (KINDS[kind] or object) in type(run.optimizer.optimizer).__mro__
    run.advance(2)
    assert get_num_updates(run.optimizer) == 2
    run.save()


@pytest.mark.parametrize("place", PLACES)
def test_each_adam_goes_on_from_each_other(pool, tmp_path, place):
    parallel, optimizer = PLACES[place]
    other = TP2 if parallel == DP2_DISTRIBUTED else parallel  # and from another layout
    pool(2).run(save_all, parallel, optimizer, str(tmp_path))
    pool(2).run(go_on_from_all, other, optimizer, str(tmp_path))


def save_all(parallel: ParallelConfig, optimizer: OptimizerConfig, folder: str) -> None:
    for kind in KINDS:
        save_with(kind, parallel, optimizer, f"{folder}/{kind}")


def go_on_from_all(parallel: ParallelConfig, optimizer: OptimizerConfig, folder: str) -> None:
    """After two updates by one and one by another, weights are those of three by the formula."""
    start = torch.bfloat16 if optimizer.bf16 else torch.float32
    for saving, loading in product(KINDS, KINDS):
        with installed_adam(loading):
            load_and_go_on(parallel, optimizer, f"{folder}/{saving}", start)


@pytest.mark.parametrize("kind", KINDS)
def test_the_count_is_read_and_set_before_and_after_the_first_update(kind, groups):
    with installed_adam(kind):
        run = Run(ParallelConfig(), FP32, CheckpointConfig())
    assert get_num_updates(run.optimizer) == 0
    set_num_updates(run.optimizer, 5)
    assert get_num_updates(run.optimizer) == 5
    run.advance(1)
    assert get_num_updates(run.optimizer) == 6
    set_num_updates(run.optimizer, 1)
    assert get_num_updates(run.optimizer) == 1


def test_a_group_of_which_a_rank_owns_nothing_does_not_count(groups):
    with installed_adam("te"):
        run = Run(ParallelConfig(), FP32, CheckpointConfig())
    adam = run.optimizer.optimizer
    assert isinstance(adam, TransformerEngineAdam)
    adam.param_groups.append({**adam.param_groups[0], "params": []})
    set_num_updates(run.optimizer, 2)
    adam.step()
    assert [group["step"] for group in adam.param_groups] == [3, 2]
    assert get_num_updates(run.optimizer) == 3
