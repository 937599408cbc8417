"""Fixtures every test may use: seeds, the CPU device, the groups of one process, pools of worker processes.

Megatron-Core is imported by the fixtures that need it: loading it takes seconds, and most tests do without.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.helpers.distributed import WorkerPool

if TYPE_CHECKING:
    from megatron_metro.device import Device
    from megatron_metro.parallel.groups import ParallelGroups

# The cores are shared with the worker processes of a test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(1234)
    np.random.seed(1234)
    torch.manual_seed(1234)


@pytest.fixture(scope="session")
def device() -> Device:
    """The CPU, adapter installed."""
    from megatron_metro.device import activate

    return activate("cpu")


@pytest.fixture
def groups(device: Device) -> ParallelGroups:
    """The groups of the test process alone."""
    from megatron_metro.parallel.groups import single_process

    return single_process(device)


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], WorkerPool]]:
    """`pool(world_size)`: worker processes that live on from test to test, started on first use.

    Only one size lives at a time: asking for another ends the former, so that no more than four processes exist.
    """
    living: list[WorkerPool] = []

    def of_size(world_size: int) -> WorkerPool:
        if living and living[0].world_size != world_size:
            living.pop().close()
        if not living:
            living.append(WorkerPool(world_size))
        return living[0]

    yield of_size
    for workers in living:
        workers.close()
