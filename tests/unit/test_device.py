"""The device of a process: what the CPU adapter changes and what it must leave alone, seeds, refusals."""

import itertools
import logging

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_metro.device import CPU_ADAPTER, Device, activate


def test_activation_is_idempotent(device: Device) -> None:
    installed = [getattr(patch.owner, patch.name) for patch in CPU_ADAPTER]
    assert activate("cpu") == device
    assert [getattr(patch.owner, patch.name) for patch in CPU_ADAPTER] == installed
    assert (device.kind, device.backend, device.torch_device) == ("cpu", "gloo", torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto means CUDA here")
def test_auto_is_the_cpu_without_a_gpu(device: Device) -> None:
    assert activate("auto") == device


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA exists here")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^--device: cuda .*; use --device cpu$"):
        activate("cuda")


def test_nccl_on_the_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^--distributed-backend: nccl .*use gloo"):
        activate("cpu", "nccl")


@pytest.mark.usefixtures("device")
class TestAdapter:
    """Names that core asks CUDA for, answered by the CPU."""

    @pytest.mark.parametrize("name", ["cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 2)])
    def test_cuda_means_the_cpu(self, name: str | torch.device) -> None:
        assert torch.zeros(2, device=name).device.type == "cpu"
        assert torch.tensor([1.0], device=name).device.type == "cpu"
        assert torch.empty(2, device=torch.cuda.current_device()).device.type == "cpu"

    def test_other_devices_stay(self) -> None:
        assert torch.zeros(2, device="meta").device.type == "meta"
        assert torch.zeros(2, dtype=torch.int8).dtype == torch.int8
        assert torch.tensor(3).item() == 3

    def test_meta_context_still_works(self) -> None:
        with torch.device("meta"):
            assert torch.zeros(2).device.type == "meta"
            assert torch.nn.Linear(2, 2).weight.device.type == "meta"

    def test_cuda_is_the_same_tensor(self) -> None:
        tensor = torch.ones(2)
        assert tensor.cuda() is tensor
        assert tensor.cuda(torch.cuda.current_device(), non_blocking=True) is tensor

    @pytest.mark.parametrize(
        ("dtype", "name"),
        [
            (torch.float32, "torch.cuda.FloatTensor"),
            (torch.float64, "torch.cuda.FloatTensor"),
            (torch.bfloat16, "torch.cuda.BFloat16Tensor"),
            (torch.float16, "torch.cuda.HalfTensor"),
            (torch.int64, "torch.LongTensor"),
        ],
    )
    def test_type_names(self, dtype: torch.dtype, name: str) -> None:
        assert torch.ones(1, dtype=dtype).type() == name

    def test_type_still_converts(self) -> None:
        assert torch.ones(1).type(torch.int64).dtype == torch.int64
        assert torch.ones(1).type(dtype="torch.DoubleTensor").dtype == torch.float64

    def test_cuda_stays_unavailable(self) -> None:
        assert torch.cuda.is_available() == (torch.version.cuda is not None and torch.cuda.device_count() > 0)


def draw(is_sharded: bool) -> Tensor:
    """A dropout mask in the stream of sharded or of replicated activations."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    if not is_sharded:
        return functional.dropout(torch.ones(64), 0.5)
    with get_cuda_rng_tracker().fork():
        return functional.dropout(torch.ones(64), 0.5)


def masks(device: Device, **ranks: int) -> tuple[Tensor, Tensor]:
    device.seed_all(11, **ranks)
    return draw(is_sharded=True), draw(is_sharded=False)


class TestSeeds:
    """Streams of dropout: sharded activations differ between tensor-parallel ranks, replicated ones agree."""

    def test_same_seed_same_masks(self, device: Device) -> None:
        for first, second in zip(masks(device), masks(device)):
            assert torch.equal(first, second)

    def test_tensor_parallel_ranks_differ_in_what_they_shard(self, device: Device) -> None:
        (sharded_0, replicated_0), (sharded_1, replicated_1) = masks(device), masks(device, tp_rank=1)
        assert not torch.equal(sharded_0, sharded_1)
        assert torch.equal(replicated_0, replicated_1)

    @pytest.mark.parametrize("axis", ["pp_rank", "dp_rank"])
    def test_stages_and_replicas_differ_in_both(self, axis: str, device: Device) -> None:
        for here, there in zip(masks(device), masks(device, **{axis: 1})):
            assert not torch.equal(here, there)

    def test_no_two_ranks_of_a_large_job_share_a_stream(self, device: Device) -> None:
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        streams: set[int] = set()
        ranks = list(itertools.product((0, 1, 7, 15), (0, 1, 2, 63, 511)))
        for pp_rank, dp_rank in ranks:
            for tp_rank in range(8):
                device.seed_all(11, tp_rank=tp_rank, pp_rank=pp_rank, dp_rank=dp_rank)
                streams |= get_cuda_rng_tracker().seeds_
        # Per stage and replica: one replicated stream, and a sharded and an expert stream per tensor-parallel rank.
        assert len(streams) == len(ranks) * (1 + 8 + 8)

    def test_forks_leave_the_common_stream_where_it_was(self, device: Device) -> None:
        device.seed_all(11)
        without_fork = torch.rand(4)
        device.seed_all(11)
        draw(is_sharded=True)
        assert torch.equal(torch.rand(4), without_fork)

    def test_successive_forks_go_on(self, device: Device) -> None:
        device.seed_all(11)
        assert not torch.equal(draw(is_sharded=True), draw(is_sharded=True))

    def test_forks_do_not_warn(self, device: Device, caplog: pytest.LogCaptureFixture) -> None:
        device.seed_all(11)
        with caplog.at_level(logging.WARNING):
            draw(is_sharded=True)
        assert not caplog.records


class TestMemory:
    """Byte counts of the process."""

    def test_counts_follow_allocations(self, device: Device) -> None:
        before = device.memory_bytes()
        block = torch.ones(64 * 2**20)  # 256 MiB, written and so resident; more than the heap has lying free
        assert device.memory_bytes() - before > 128 * 2**20
        assert device.peak_memory_bytes() >= device.memory_bytes() - 2**20
        assert block[0] == 1.0
        device.reset_peak_memory()
        device.synchronize()
