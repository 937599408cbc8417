"""Faults put in on purpose, one per row of design section 5: each must turn the parity test red."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_metro.losses.step import COUNT_NAMES, StepLosses
from megatron_metro.model import network as network_module
from megatron_metro.model import piece as piece_module
from megatron_metro.model import slots as slots_module
from megatron_metro.model.packed_rows import ignored_keys
from megatron_metro.parallel.boundary import BoundaryPayload
from megatron_metro.parallel.groups import all_reduce_sum
from megatron_metro.training import engine as engine_module
from megatron_metro.training.engine import Engine


@contextmanager
def replaced_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for a while."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def dropped_injection(engine: Engine) -> Iterator[None]:
    """MLM and RTD are computed and logged, but never trained."""
    with replaced_attribute(StepLosses, "inject", lambda self, activation, loss: activation):
        yield


@contextmanager
def _dropped_term(name: str) -> Iterator[None]:
    """The loss that this method of StepLosses returns is computed and logged, but never trained."""
    compute, inject = getattr(StepLosses, name), StepLosses.inject
    dropped: list[Tensor] = []

    def compute_dropped(self: StepLosses, *arguments: Any) -> Tensor:
        dropped[:] = [compute(self, *arguments)]
        return dropped[0]

    def inject_others(self: StepLosses, activation: Tensor, loss: Tensor) -> Tensor:
        return activation if dropped and loss is dropped[0] else inject(self, activation, loss)

    with replaced_attribute(StepLosses, name, compute_dropped), replaced_attribute(StepLosses, "inject", inject_others):
        yield


def dropped_mlm(engine: Engine) -> AbstractContextManager[None]:
    """The generator is never trained by its own loss."""
    return _dropped_term("add_mlm")


def dropped_rtd(engine: Engine) -> AbstractContextManager[None]:
    """The encoder never learns to tell replaced tokens."""
    return _dropped_term("add_rtd")


@contextmanager
def skipped_shared_sum(engine: Engine) -> Iterator[None]:
    """Copies of the token matrix keep their own gradients."""
    with replaced_attribute(engine.shared, "sum_gradients", lambda: None):
        yield


@contextmanager
def missing_sequence_mark(engine: Engine) -> Iterator[None]:
    """One norm's gradient is not summed over the tensor-parallel group."""
    for piece in engine.pieces:
        for name, parameter in piece.named_parameters():
            if name == "encoder.layers.0.mlp_norm.weight":
                parameter.sequence_parallel = False
    yield


@contextmanager
def shifted_slot(engine: Engine) -> Iterator[None]:
    """Hidden states are read one position beside the masked one."""
    original: Callable[..., Tensor] = slots_module._local_rows

    def read_shifted(hidden: Tensor, slots: Tensor, *rest: Any) -> Tensor:
        return original(hidden, (slots - 1).clamp(min=0), *rest)

    with replaced_attribute(slots_module, "_local_rows", read_shifted):
        yield


@contextmanager
def shifted_ids(engine: Engine) -> Iterator[None]:
    """A stage takes the fill of each slot for that of the next one; few ids, since nearly all fills are wrong ones."""
    unpack = piece_module.unpack

    def unpack_shifted(*arguments: Any) -> BoundaryPayload:
        payload = unpack(*arguments)
        return payload if payload.sampled_ids is None else replace(payload, sampled_ids=payload.sampled_ids.roll(1, 1))

    with replaced_attribute(piece_module, "unpack", unpack_shifted):
        yield


@contextmanager
def local_divisor(engine: Engine) -> Iterator[None]:
    """Each replica divides its terms by its own tokens instead of the global batch's."""

    def reduce_others(tensor: Tensor, group: object) -> Tensor:
        return tensor if tensor.numel() == len(COUNT_NAMES) else all_reduce_sum(tensor, group)

    with replaced_attribute(engine_module, "all_reduce_sum", reduce_others):
        yield


@contextmanager
def seen_sources(engine: Engine) -> Iterator[None]:
    """In packed rows targets attend to the sources of all examples of their row."""

    def ignore_fewer(padding: Tensor | None, queries: Tensor | None = None, keys: Tensor | None = None) -> Any:
        return ignored_keys(padding, queries, keys) if queries is keys else ignored_keys(padding)

    with replaced_attribute(piece_module, "ignored_keys", ignore_fewer):
        yield


@contextmanager
def seen_neighbours(engine: Engine) -> Iterator[None]:
    """In packed rows sources attend to the other sources of their row, and targets to those before them."""

    def ignore_fewer(padding: Tensor | None, queries: Tensor | None = None, keys: Tensor | None = None) -> Any:
        return ignored_keys(padding) if queries is keys else ignored_keys(padding, queries, keys)

    with replaced_attribute(piece_module, "ignored_keys", ignore_fewer):
        yield


@contextmanager
def counted_on(engine: Engine) -> Iterator[None]:
    """In packed rows positions go on from one example to the next."""

    def count(segments: Tensor) -> Tensor:
        return torch.arange(segments.shape[1]).expand_as(segments)

    with replaced_attribute(network_module, "count_positions", count):
        yield
