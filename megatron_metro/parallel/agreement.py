"""What one rank finds out, said to all: results, and errors, so that no rank waits for one that has given up."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_metro.config.errors import MetroError, StorageError, first_line

T = TypeVar("T")


def on_first_rank(function: Callable[[], T]) -> T:
    """The result of `function` on rank 0, on every rank; so is its error."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except Exception as error:  # noqa: BLE001 (whatever it is, the other ranks must not wait for it)
            answer[1] = _as_told(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    result: T = answer[0]
    return result


def on_every_rank(function: Callable[[], T]) -> T:
    """This rank's result of `function`; where it fails on any rank, the error of the first such rank on all."""
    result: list[T] = []
    error: Exception | None = None
    try:
        result.append(function())
    except Exception as caught:  # noqa: BLE001 (whatever it is, the other ranks must not wait for it)
        error = _as_told(caught)
    for rank, told in enumerate(gather_on_all(error)):
        if told is not None:
            raise type(told)(f"rank {rank}: {told}")
    return result[0]


def gather_on_first(value: T) -> list[T]:
    """`value` of every rank, in rank order, on rank 0; an empty list elsewhere."""
    answers: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, answers)
    return answers or []


def gather_on_all(value: T) -> list[T]:
    """`value` of every rank, in rank order, on every rank."""
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, value)
    return answers


def _as_told(error: Exception) -> Exception:
    """The error as it goes to other ranks: a MetroError as it is, what the file system says, or a fault of ours."""
    if isinstance(error, MetroError):
        return error
    return (StorageError if isinstance(error, OSError) else RuntimeError)(first_line(error))
