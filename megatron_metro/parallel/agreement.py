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
        except MetroError as error:
            answer[1] = error
        except OSError as error:
            answer[1] = StorageError(first_line(error))
        except Exception as error:  # noqa: BLE001 (a fault of ours; the other ranks must not wait for it)
            answer[1] = RuntimeError(first_line(error))
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    result: T = answer[0]
    return result


def gather_on_all(value: T) -> list[T]:
    """`value` of every rank, in rank order, on every rank."""
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, value)
    return answers
