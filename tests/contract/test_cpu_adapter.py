"""The CPU adapter is neither too small (core's paths run on it) nor too large (each row is needed by one of them)."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed import WorkerError, WorkerPool

# Which path of core needs a row: a single process reaches most of them.
ALONE = {
    "torch.tensor": "train",
    "torch.zeros": "train",
    "Tensor.type": "train",
    "torch.cuda.current_device": "train",
    "torch.cuda.manual_seed": "train",
    "torch.cuda.get_rng_state": "train",
    "torch.cuda.random.get_rng_state": "train",
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": "train",
    "Tensor.cuda": "reload_loss_scale",
}
IN_A_PIPELINE = {"torch.cuda.synchronize"}


def full_name(patch: Any) -> str:
    return f"{patch.owner.__name__}.{patch.name}"


def find_patch(name: str) -> Any:
    from megatron_metro.device import CPU_ADAPTER

    return next(patch for patch in CPU_ADAPTER if full_name(patch) == name)


def exercise(path: str) -> Any:
    """Plain numbers from one path of core."""
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    from tests.helpers.core_model import Setting, train

    if path == "train":
        return train(Setting(precision="fp64", dropout=0.5, num_layers=2, num_steps=2, recompute=True))
    scaler = DynamicGradScaler(16.0, 1.0, 2.0, 0.5, 100, 1)
    scaler.load_state_dict(scaler.state_dict())
    return scaler.scale.item()


def exercise_without(name: str, path: str) -> Any:
    """The same with one row of the adapter taken out."""
    patch = find_patch(name)
    patch.remove()
    try:
        return exercise(path)
    finally:
        patch.install()


def run_pipeline_without(name: str) -> Any:
    from tests.helpers.core_model import Setting, train

    patch = find_patch(name)
    patch.remove()
    try:
        return train(Setting(pp=2, num_layers=2, num_steps=1))
    finally:
        patch.install()


@pytest.mark.usefixtures("device")
def test_every_row_has_a_test() -> None:
    from megatron_metro.device import CPU_ADAPTER

    assert {full_name(patch) for patch in CPU_ADAPTER} == {*ALONE, *IN_A_PIPELINE}
    assert all(patch.is_installed for patch in CPU_ADAPTER)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the originals work too")
@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("name", ALONE)
def test_row_is_needed(name: str) -> None:
    expected = exercise(ALONE[name])
    try:
        without = exercise_without(name, ALONE[name])
    except (AssertionError, RuntimeError, TypeError):
        return  # core cannot do without it
    assert without != expected, f"{name} is no longer needed: core does the same without it"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the originals work too")
@pytest.mark.parametrize("name", sorted(IN_A_PIPELINE))
def test_row_is_needed_in_a_pipeline(name: str, pool: Callable[[int], WorkerPool]) -> None:
    with pytest.raises(WorkerError, match="CUDA"):
        pool(2).run(run_pipeline_without, name)


def train_setting(options: dict[str, Any]) -> Any:
    from tests.helpers.core_model import Setting, train

    return train(Setting(**options))


def save_and_load_setting(options: dict[str, Any], folder: str) -> Any:
    from tests.helpers.core_model import Setting, save_and_load

    return save_and_load(Setting(**options), folder)


# On the left what is asked of core, on the right the plainest run that must show the same losses and norms.
SAME_RESULTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"tp": 2, "sequence_parallel": True}, {"tp": 2}),
    ({"tp": 2, "dropout": 0.3, "recompute": True}, {"tp": 2, "dropout": 0.3}),
    ({"overlap": True}, {}),
    ({"distributed_optimizer": True}, {}),
    ({"distributed_optimizer": True, "overlap": True}, {}),
    ({"distributed_optimizer": True, "overlap": True, "precision": "bf16"}, {"precision": "bf16"}),
    ({"distributed_optimizer": True, "overlap": True, "precision": "fp16"}, {"precision": "fp16"}),
    ({"pp": 2, "distributed_optimizer": True, "precision": "fp16"}, {"pp": 2, "precision": "fp16"}),
    ({"pp": 2, "vpp": 2, "distributed_optimizer": True, "overlap": True}, {"pp": 2, "vpp": 2}),
    ({"pp": 2, "vpp": 2, "distributed_optimizer": True, "precision": "fp16"}, {"pp": 2, "vpp": 2, "precision": "fp16"}),
    ({"pp": 2, "vpp": 2, "precision": "bf16", "recompute": True}, {"pp": 2, "vpp": 2, "precision": "bf16"}),
]


def describe(options: Any) -> str:
    return "-".join(key if value is True else f"{key}{value}" for key, value in options.items()) or "plain"


@pytest.mark.parametrize(("options", "plainer"), SAME_RESULTS, ids=describe)
def test_core_paths_run_on_gloo(
    options: dict[str, Any], plainer: dict[str, Any], pool: Callable[[int], WorkerPool]
) -> None:
    results = pool(2).run(train_setting, options)
    expected = pool(2).run(train_setting, plainer)
    for rank_result, rank_expected in zip(results, expected):
        for numbers, expected_numbers in zip(rank_result, rank_expected):
            assert numbers == pytest.approx(expected_numbers, rel=1e-5)
            assert expected_numbers[1] > 0  # a step was made, not skipped


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tp": 2, "precision": "fp16"},
        {"distributed_optimizer": True},
        {"distributed_optimizer": True, "overlap": True, "precision": "bf16"},
    ],
    ids=describe,
)
def test_checkpoints_resume_exactly(options: dict[str, Any], tmp_path: Path, pool: Callable[[int], WorkerPool]) -> None:
    folder = tmp_path / "checkpoint"
    for went_on, resumed in pool(2).run(save_and_load_setting, options, str(folder)):
        assert resumed == went_on
    shutil.rmtree(folder)
