"""Core's unmodified schedules over pieces whose boundaries all differ in shape, against one process."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_metro.config.schema import ParallelConfig
from tests.helpers.distributed import WorkerPool

BATCH, WIDTH = 2, 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pipeline and how core is asked to run it."""

    pp: int
    vpp: int
    num_microbatches: int
    overlap: bool = False
    deallocate: bool = True
    forward_only: bool = False
    group_size: int | None = None
    warmup_flush: bool = False
    num_steps: int = 2

    def __str__(self) -> str:
        flags = [name for name in ("overlap", "deallocate", "forward_only", "warmup_flush") if getattr(self, name)]
        group = [] if self.group_size is None else [f"group{self.group_size}"]
        return "-".join([f"pp{self.pp}", f"vpp{self.vpp}", f"m{self.num_microbatches}", *group, *flags])


def rows_after(piece: int) -> int:
    """Rows of the message that a piece sends: another number at every boundary."""
    return 3 + (5 * (piece + 1)) % 7 + piece


def payload_shape(piece: int) -> tuple[int, int, int]:
    return rows_after(piece), BATCH, WIDTH


class Piece(nn.Module):
    """A piece of the chain: mixes rows and width, and changes the number of rows."""

    def __init__(self, index: int, config: Any) -> None:
        from megatron.core.enums import ModelType

        super().__init__()
        self.model_type = ModelType.encoder_or_decoder
        generator = torch.Generator().manual_seed(100 + index)
        rows_in, rows_out = rows_after(index - 1), rows_after(index)

        def make(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5)

        self.rows, self.width = make(rows_out, rows_in), make(WIDTH, WIDTH)
        self.config = config
        self.received: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        self.received = tensors[0]

    def forward(self, microbatch: Tensor) -> Tensor:
        hidden = microbatch if self.received is None else self.received
        return torch.einsum("rs,sbh,hk->rbk", self.rows, hidden, self.width).tanh()


def make_microbatch(step: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + index)
    return torch.randn(*payload_shape(-1), generator=generator, dtype=torch.float64)


def microbatches(step: int, count: int) -> Iterator[Tensor]:
    yield from (make_microbatch(step, index) for index in range(count))


def forward_step(data: Iterator[Tensor], piece: Piece) -> tuple[Tensor, Callable[[Tensor], tuple[Any, ...]]]:
    output = piece(next(data))

    def loss(last: Tensor) -> tuple[Tensor, Tensor, float]:
        total = last.square().sum()
        return total, torch.tensor(3, dtype=torch.int), total.item()

    return output, loss


def make_config(case: Case) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=case.pp * case.vpp,
        hidden_size=WIDTH,
        num_attention_heads=1,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vpp if case.vpp > 1 else None,
        microbatch_group_size_per_vp_stage=case.group_size,
        pipeline_dtype=torch.float64,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=case.deallocate,
        overlap_p2p_comm=case.overlap,
        overlap_p2p_comm_warmup_flush=case.warmup_flush,
        batch_p2p_comm=not case.overlap,
    )


def train_pipeline(case: Case) -> dict[str, Any]:
    """Losses, gradients by (piece, name) and bytes sent of this rank over some steps."""
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from megatron_metro.parallel.communicator import StaticShapeCommunicator
    from megatron_metro.parallel.groups import reinitialise

    groups = reinitialise(
        ParallelConfig(pipeline_model_parallel_size=case.pp, num_virtual_stages_per_pipeline_rank=case.vpp)
    )
    config = make_config(case)
    communicator = StaticShapeCommunicator(groups.pp_group, config)
    pieces = [Piece(chunk * case.pp + groups.pp_rank, config) for chunk in range(case.vpp)]
    losses: list[float] = []
    for step in range(case.num_steps):
        with communicator.step(case.num_microbatches, payload_shape, forward_only=case.forward_only):
            losses += get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[microbatches(step, case.num_microbatches) for _ in pieces],
                model=pieces,
                num_microbatches=case.num_microbatches,
                seq_length=1,
                micro_batch_size=BATCH,
                forward_only=case.forward_only,
                p2p_communicator=communicator,
                pg_collection=groups.collection,
            )
    return {
        "losses": losses,
        "gradients": {
            (chunk * case.pp + groups.pp_rank, name): parameter.grad
            for chunk, piece in enumerate(pieces)
            for name, parameter in piece.named_parameters()
        },
        "bytes": (communicator.forward_bytes_sent, communicator.backward_bytes_sent),
    }


def train_alone(case: Case) -> tuple[list[float], dict[tuple[int, str], Tensor | None]]:
    """The same chain and microbatches in this process with plain autograd."""
    pieces = [Piece(index, None) for index in range(case.pp * case.vpp)]
    losses: list[float] = []
    for step in range(case.num_steps):
        for hidden in microbatches(step, case.num_microbatches):
            for piece in pieces:
                piece.set_input_tensor([None])
                hidden = piece(hidden)
            loss = hidden.square().sum()
            losses.append(loss.item())
            if not case.forward_only:
                loss.backward()
    names = {(index, name): p.grad for index, piece in enumerate(pieces) for name, p in piece.named_parameters()}
    return losses, names


CASES = [
    Case(pp=2, vpp=1, num_microbatches=5),
    Case(pp=2, vpp=1, num_microbatches=1, deallocate=False),
    Case(pp=2, vpp=1, num_microbatches=3, forward_only=True),
    Case(pp=2, vpp=2, num_microbatches=2, overlap=True),
    Case(pp=2, vpp=2, num_microbatches=6, overlap=True),
    Case(pp=2, vpp=2, num_microbatches=7, overlap=True, group_size=5),
    Case(pp=2, vpp=2, num_microbatches=4, overlap=True, forward_only=True),
    Case(pp=2, vpp=2, num_microbatches=6, overlap=True, warmup_flush=True),
    Case(pp=2, vpp=4, num_microbatches=2, overlap=True),
    Case(pp=2, vpp=4, num_microbatches=8, overlap=True),
    Case(pp=3, vpp=1, num_microbatches=2),
    Case(pp=3, vpp=1, num_microbatches=7),
    Case(pp=3, vpp=2, num_microbatches=3),
    Case(pp=3, vpp=2, num_microbatches=6, overlap=True),
    Case(pp=3, vpp=2, num_microbatches=8, overlap=True, group_size=5),
    Case(pp=3, vpp=4, num_microbatches=6),
    Case(pp=3, vpp=4, num_microbatches=9, overlap=True),
    Case(pp=3, vpp=2, num_microbatches=6, overlap=True, warmup_flush=True, forward_only=True),
    Case(pp=4, vpp=1, num_microbatches=2),
    Case(pp=4, vpp=1, num_microbatches=8),
    Case(pp=4, vpp=2, num_microbatches=4),
    Case(pp=4, vpp=2, num_microbatches=8, overlap=True),
    Case(pp=4, vpp=2, num_microbatches=8, overlap=True, warmup_flush=True),
    Case(pp=4, vpp=2, num_microbatches=8, forward_only=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_schedules_agree_with_one_process(case: Case, pool: Callable[[int], WorkerPool]) -> None:
    results = pool(case.pp).run(train_pipeline, case)
    losses, gradients = train_alone(case)
    assert results[-1]["losses"] == pytest.approx(losses, rel=1e-12)
    assert all(not result["losses"] for result in results[:-1])
    piped = {key: value for result in results for key, value in result["gradients"].items()}
    assert piped.keys() == gradients.keys()
    for key, expected in gradients.items():
        if case.forward_only:
            assert piped[key] is None
        else:
            torch.testing.assert_close(piped[key], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[12]], ids=str)
def test_bytes_sent_are_the_planned_ones(case: Case, pool: Callable[[int], WorkerPool]) -> None:
    results = pool(case.pp).run(train_pipeline, case)
    boundaries = range(case.pp * case.vpp - 1)
    planned = sum(rows_after(piece) * BATCH * WIDTH * 8 for piece in boundaries) * case.num_microbatches
    assert sum(result["bytes"][0] for result in results) == planned
    assert sum(result["bytes"][1] for result in results) == planned


def build_communicator_without_overlap() -> str:
    from megatron_metro.parallel.communicator import StaticShapeCommunicator
    from megatron_metro.parallel.groups import reinitialise

    groups = reinitialise(ParallelConfig(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2))
    config = make_config(Case(pp=2, vpp=2, num_microbatches=2))
    try:
        StaticShapeCommunicator(groups.pp_group, config)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_two_interleaved_stages_without_overlap_are_refused_by_name(pool: Callable[[int], WorkerPool]) -> None:
    for message in pool(2).run(build_communicator_without_overlap):
        assert message.startswith("--no-overlap-p2p-communication: ")
        assert "\n" not in message
