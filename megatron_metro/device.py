"""CUDA with NCCL or CPU with gloo: the device of a process, its seeds, memory and synchronisation.

Megatron-Core names CUDA in some 370 places. On the CPU a table of wrappers (`CPU_ADAPTER`, below) answers for the few
names its parallel layers, schedules, optimizers and checkpoints really need; on CUDA nothing is touched. Every row has
a contract test that fails once a new Megatron-Core no longer needs it, or needs more.
"""

import ctypes
import functools
import logging
import os
import random
import resource
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel import random as core_random
from torch import Tensor

from megatron_metro.config.errors import ConfigError

DeviceKind = Literal["cuda", "cpu"]
Backend = Literal["nccl", "gloo"]

_CPU = torch.device("cpu")
# Core's optimizers choose their parameter groups by the name of the tensor type. They know no double precision; the
# exact parity tests run in it, and it needs no FP32 main copy either, so it passes as single.
_CUDA_TYPE_NAMES = {
    torch.float64: "torch.cuda.FloatTensor",
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}
# Ranks that share a data-parallel group or a stage must not share dropout masks; these strides keep their seeds apart
# from each other and from the offsets core adds per tensor-parallel rank (2718 + rank).
_PIPELINE_SEED_STRIDE = 100
_DATA_SEED_STRIDE = 100_003
# Options of glibc's mallopt (malloc.h): when the end of the heap is given back, how many blocks lie outside of it.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Where this process computes and how it talks to others; made by `activate`."""

    kind: DeviceKind
    backend: Backend
    torch_device: torch.device

    def synchronize(self) -> None:
        """Wait until everything queued on the device is done (nothing to wait for on the CPU)."""
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def memory_bytes(self) -> int:
        """Bytes in use: allocated tensors on CUDA, resident memory of the process on the CPU."""
        if self.kind == "cuda":
            return torch.cuda.memory_allocated(self.torch_device)
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()

    def peak_memory_bytes(self) -> int:
        """Most bytes ever in use since the last `reset_peak_memory` (CUDA) or the start of the process (CPU)."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self.torch_device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def reset_peak_memory(self) -> None:
        """Start a new peak on CUDA; the kernel's peak of a CPU process cannot be reset."""
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats(self.torch_device)

    def seed_all(self, seed: int, *, tp_rank: int = 0, pp_rank: int = 0, dp_rank: int = 0) -> None:
        """Seed every random generator of the process, dropout's under tensor parallelism included.

        Tensor-parallel ranks get one common stream for what they replicate and one each for what they shard; pipeline
        stages and data-parallel replicas differ in both (in Megatron replicas draw the same dropout masks).
        """
        rank_seed = seed + _PIPELINE_SEED_STRIDE * pp_rank + _DATA_SEED_STRIDE * dp_rank
        random.seed(rank_seed)
        np.random.seed(rank_seed % 2**32)
        torch.manual_seed(rank_seed)
        model_parallel_cuda_manual_seed(rank_seed, tp_rank=tp_rank, ep_rank=0, etp_rank=tp_rank)


def activate(kind: Literal["auto", "cuda", "cpu"], backend: Backend | None = None) -> Device:
    """Choose this process's device, make it current, and on the CPU install the adapter (once, however often called).

    Raises ConfigError where the device or the backend does not exist here.
    """
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        return _activate_cuda(backend or "nccl")
    if backend == "nccl":
        raise ConfigError("--distributed-backend: nccl moves no CPU tensors; use gloo (or --device cuda)")
    # Advice on CUDA's queues, which nobody here has.
    warnings.filterwarnings("ignore", ".*environment variable CUDA_DEVICE_MAX_CONNECTIONS", UserWarning)
    _install_cpu_adapter()
    return Device(kind="cpu", backend="gloo", torch_device=_CPU)


def keep_freed_memory() -> None:
    """Have the host's allocator keep what the process frees, as a GPU's caching allocator does; glibc only.

    Otherwise a block beyond 32 MiB (the gradient of a large token matrix) is fresh, zeroed pages at every use, which
    costs as much as the arithmetic on it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _activate_cuda(backend: Backend) -> Device:
    if not torch.cuda.is_available():
        raise ConfigError("--device: cuda was asked for but torch sees no CUDA device here; use --device cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    num_devices = torch.cuda.device_count()
    if backend == "nccl" and local_rank >= num_devices:
        raise ConfigError(
            f"torchrun --nproc-per-node: local rank {local_rank} has no GPU of its own among {num_devices}; "
            "start one process per GPU"
        )
    torch_device = torch.device("cuda", local_rank % num_devices)
    torch.cuda.set_device(torch_device)
    return Device(kind="cuda", backend=backend, torch_device=torch_device)


@dataclass(frozen=True, slots=True)
class Patch:
    """One name that the CPU adapter replaces."""

    owner: ModuleType | type
    name: str
    replacement: Callable[..., Any]
    original: Callable[..., Any]

    def install(self) -> None:
        setattr(self.owner, self.name, self.replacement)

    def remove(self) -> None:
        setattr(self.owner, self.name, self.original)

    @property
    def is_installed(self) -> bool:
        return getattr(self.owner, self.name) is self.replacement


def _names_cuda(device: object) -> bool:
    """Whether a `device` argument means a GPU: "cuda:1" or torch.device("cuda")."""
    return device.startswith("cuda") if isinstance(device, str) else getattr(device, "type", None) == "cuda"


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A tensor factory whose `device="cuda"` means the CPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        if device is not None and _names_cuda(device):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


def _same_tensor(tensor: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return tensor


def _with_cuda_type_names(tensor_type: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type` that answers "torch.cuda.FloatTensor" and converts as before when given a type."""

    @functools.wraps(tensor_type)
    def name_or_convert(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:
            return _CUDA_TYPE_NAMES.get(tensor.dtype) or tensor_type(tensor)
        return tensor_type(tensor, *args, **kwargs)

    return name_or_convert


def _current_device() -> torch.device:
    return _CPU


def _do_nothing(*_args: Any, **_kwargs: Any) -> None:
    """Nothing is queued on a CPU."""


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _get_rng_state(device: object = None) -> Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(new_state: Tensor, device: object = -1, graph_safe: bool = False) -> None:
    torch.default_generator.set_state(new_state)


def _patch(owner: ModuleType | type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Patch:
    original = getattr(owner, name)
    return Patch(owner, name, wrap(original), original)


def _replace(owner: ModuleType | type, name: str, replacement: Callable[..., Any]) -> Patch:
    return Patch(owner, name, replacement, getattr(owner, name))


# Core's other factory calls take their device from `current_device`, so two functions are all that need wrapping.
CPU_ADAPTER: tuple[Patch, ...] = (
    _patch(torch, "tensor", _on_cpu),
    _patch(torch, "zeros", _on_cpu),
    _replace(Tensor, "cuda", _same_tensor),
    _patch(Tensor, "type", _with_cuda_type_names),
    _replace(torch.cuda, "current_device", _current_device),
    _replace(torch.cuda, "synchronize", _do_nothing),
    _replace(torch.cuda, "manual_seed", _manual_seed),
    _replace(torch.cuda, "get_rng_state", _get_rng_state),
    _replace(torch.cuda.random, "get_rng_state", _get_rng_state),
    _replace(core_random, "_set_cuda_rng_state", _set_rng_state),
)


def _is_not_fork_warning(record: logging.LogRecord) -> bool:
    """Drop core's warning that the CPU generator moved inside an RNG fork: on the CPU that generator is the point."""
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _install_cpu_adapter() -> None:
    if all(patch.is_installed for patch in CPU_ADAPTER):
        return
    with _CPU:
        # torch collects its factory functions for `with torch.device(...)` on first use and never again; it must see
        # the originals, or `with torch.device("meta")` has no effect afterwards.
        torch.empty(0)
    for patch in CPU_ADAPTER:
        patch.install()
    logging.getLogger(core_random.__name__).addFilter(_is_not_fork_warning)
