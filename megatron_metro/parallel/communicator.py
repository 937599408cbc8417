"""Pipeline messages of static but unequal shapes, under Megatron-Core's unmodified schedules.

Core's schedules know one shape for all messages, or exchange shapes before every message. Here every boundary of the
chain has its own shape, known to all from the layout and the microbatch, so the exchange is answered from a table.
Piece p of the chain is chunk p // PP on rank p % PP; message p is what piece p sends to piece p + 1, or its gradient.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_metro.config.errors import ConfigError

Shape = tuple[int, int, int]  # rows, sequences, width
PayloadShape = Callable[[int], Shape]  # shape of what a piece sends to the next one


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageShapes:
    """All messages of one pipeline rank in one step, each list in the order in which the schedule asks for them."""

    forward_received: tuple[Shape, ...]
    forward_sent: tuple[Shape, ...]
    backward_received: tuple[Shape, ...]
    backward_sent: tuple[Shape, ...]


def list_messages(
    pp_rank: int,
    pp_size: int,
    vpp_size: int,
    num_microbatches: int,
    group_size: int,
    payload_shape: PayloadShape,
    forward_only: bool,
) -> MessageShapes:
    """The messages of a step under the 1F1B schedule (one chunk per rank) or the interleaved one.

    A rank passes its (microbatch, chunk) pairs forward in the order of core's schedule table, of which `group_size`
    consecutive microbatches stay in one chunk, and backward in the same order with the chunks reversed. The first rank
    receives from the last one, whose order is the same up to the chunk that follows.
    """
    if vpp_size == 1:
        chunks = [0] * num_microbatches
    else:
        chunks = [chunk for _, chunk in get_schedule_table(num_microbatches, vpp_size, group_size)]
    last_piece = pp_size * vpp_size - 1
    forward = [chunk * pp_size + pp_rank for chunk in chunks]
    backward = [] if forward_only else [(vpp_size - 1 - chunk) * pp_size + pp_rank for chunk in chunks]
    return MessageShapes(
        forward_received=tuple(payload_shape(piece - 1) for piece in forward if piece > 0),
        forward_sent=tuple(payload_shape(piece) for piece in forward if piece < last_piece),
        backward_received=tuple(payload_shape(piece) for piece in backward if piece < last_piece),
        backward_sent=tuple(payload_shape(piece - 1) for piece in backward if piece > 0),
    )


class StaticShapeCommunicator(P2PCommunicator):
    """Core's pipeline communicator with shapes from a table; hand it to a schedule inside `with step(...)`.

    `config` needs `variable_seq_lengths=True`, which makes core ask for shapes. After a step `forward_bytes_sent` and
    `backward_bytes_sent` hold the bytes of its messages.
    """

    def __init__(self, pp_group: ProcessGroup, config: ModelParallelConfig) -> None:
        super().__init__(pp_group, config)
        assert config.variable_seq_lengths, "core only asks for shapes with variable_seq_lengths"
        is_interleaved = config.virtual_pipeline_model_parallel_size is not None
        if is_interleaved and pp_group.size() == 2 and not config.overlap_p2p_comm:
            raise ConfigError(
                "--no-overlap-p2p-communication: two stages with --num-virtual-stages-per-pipeline-rank "
                f"{config.virtual_pipeline_model_parallel_size} exchange messages of both directions between the same "
                "two ranks and would mix them; leave the overlap on"
            )
        self.forward_bytes_sent = 0
        self.backward_bytes_sent = 0
        self._expected: dict[str, deque[Shape]] = {}
        self._last_sends: dict[str, Any] = {}

    @contextmanager
    def step(self, num_microbatches: int, payload_shape: PayloadShape, *, forward_only: bool) -> Iterator[None]:
        """Everything one call of a schedule sends and receives; checks at the end that nothing is left over."""
        messages = list_messages(
            self.pp_group.rank(),
            self.pp_group.size(),
            self.config.virtual_pipeline_model_parallel_size or 1,
            num_microbatches,
            self.config.microbatch_group_size_per_vp_stage,
            payload_shape,
            forward_only,
        )
        self._expected = {
            "recv_prev": deque(messages.forward_received),
            "send_next": deque(messages.forward_sent),
            "recv_next": deque(messages.backward_received),
            "send_prev": deque(messages.backward_sent),
        }
        self.forward_bytes_sent, self.backward_bytes_sent = 0, 0
        yield
        self._finish_sends()
        left_over = {name: list(shapes) for name, shapes in self._expected.items() if shapes}
        assert not left_over, f"the schedule ended without the messages {left_over}"

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        self.forward_bytes_sent += self._check_sent("send_next", tensor_send_next)
        self.backward_bytes_sent += self._check_sent("send_prev", tensor_send_prev)
        return self._next_received("recv_prev", recv_prev), self._next_received("recv_next", recv_next)

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        """As core's, with sends of their own tensor objects.

        Deallocation swaps the storage inside the output tensor while an overlapped send may still be reading it; the
        detached tensor that the pending operation holds keeps the storage.
        """
        received_prev, received_next, requests = super()._communicate(
            tensor_send_next=None if tensor_send_next is None else tensor_send_next.detach(),
            tensor_send_prev=None if tensor_send_prev is None else tensor_send_prev.detach(),
            recv_prev=recv_prev,
            recv_next=recv_next,
            tensor_shape=tensor_shape,
            wait_on_reqs=wait_on_reqs,
        )
        if isinstance(requests, dict):  # overlapped: core hands them out unfinished, by name
            self._last_sends.update({name: work for name, work in requests.items() if name.startswith("send")})
        return received_prev, received_next, requests

    def _check_sent(self, direction: str, tensor: Tensor | None) -> int:
        """Bytes of a message, once it is certain that the receiver expects exactly it."""
        if tensor is None:
            return 0
        shape = self._expected[direction].popleft()
        assert tuple(tensor.shape) == shape, f"{direction}: {tuple(tensor.shape)} is not the planned {shape}"
        assert tensor.dtype == self.config.pipeline_dtype, f"{direction}: {tensor.dtype} is not the pipeline's dtype"
        return tensor.numel() * tensor.element_size()

    def _next_received(self, direction: str, is_receiving: bool) -> list[int]:
        return list(self._expected[direction].popleft()) if is_receiving else [0, 0, 0]

    def _finish_sends(self) -> None:
        """Core waits for every overlapped send but the last of each direction; gloo cancels what nobody waited for."""
        for work in self._last_sends.values():
            if not work.is_completed():
                work.wait()
        self._last_sends.clear()
