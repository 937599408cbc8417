"""Weights that several pieces of the chain read: every copy gets the sum of all copies' gradients.

The one registry of holders, over stages and over the chunks of one rank (design section 4). Each copy starts from the
same initial values and sees the same gradient, so the copies stay bit-equal.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_metro.parallel.groups import ParallelGroups, new_group
from megatron_metro.parallel.layout import StageLayout


@dataclass(frozen=True, slots=True)
class _Shared:
    """One shared weight as this rank sees it."""

    name: str
    copies: tuple[nn.Parameter, ...]  # the rank's own copies, one per chunk that holds it
    group: torch.distributed.ProcessGroup | None  # ranks of this pipeline that hold it; None when this is the only one


class SharedWeights:
    """All weights of the model that live in more than one piece.

    Building it is collective: every rank creates the same process groups in the same order.
    """

    def __init__(
        self,
        holders: Mapping[str, tuple[int, ...]],
        layout: StageLayout,
        chunks: Sequence[nn.Module],
        groups: ParallelGroups,
    ) -> None:
        self._shared: list[_Shared] = []
        created: dict[tuple[int, ...], torch.distributed.ProcessGroup | None] = {}
        for name, pieces in sorted(holders.items()):
            pp_ranks = tuple(sorted({layout.place(piece)[0] for piece in pieces}))
            if len(pieces) < 2:
                continue
            if pp_ranks not in created:
                created[pp_ranks] = _create_group(pp_ranks, groups)
            copies = [
                (piece, dict(chunks[layout.place(piece)[1]].named_parameters())[name])
                for piece in pieces
                if layout.place(piece)[0] == groups.pp_rank
            ]
            for piece, parameter in copies:
                _mark(parameter, is_counted=piece == pieces[0])
            if copies:
                self._shared.append(_Shared(name, tuple(parameter for _, parameter in copies), created[pp_ranks]))
        # Also when the registry is dropped without `close`; at the end of the process torch ends all groups itself.
        self._end_groups = weakref.finalize(self, _end_groups, [group for group in created.values() if group])
        self._end_groups.atexit = False

    def close(self) -> None:
        """End the registry's own process groups; a living process that builds many models would pile them up."""
        self._end_groups()

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add up each weight's gradients over its copies. Call between the data-parallel reduction and the scaling.

        Under the distributed optimizer only a slice of each gradient is meaningful on a rank, and it is the same slice
        for all copies, because `shared_embedding` gives the weight a bucket of its own.
        """
        for shared in self._shared:
            total = _gradient(shared.copies[0])
            for other in shared.copies[1:]:
                total.add_(_gradient(other))
            if shared.group is not None:
                torch.distributed.all_reduce(total, group=shared.group)
            for other in shared.copies[1:]:
                _gradient(other).copy_(total)

    @torch.no_grad()
    def find_differing(self) -> list[str]:
        """Names of the weights whose copies are not bit-equal, the same on all their holders. Collective."""
        differing = []
        for shared in self._shared:
            copies = torch.stack([_bits(copy) for copy in shared.copies])
            low, high = copies.amin(0), copies.amax(0)
            if shared.group is not None:
                torch.distributed.all_reduce(low, op=torch.distributed.ReduceOp.MIN, group=shared.group)
                torch.distributed.all_reduce(high, op=torch.distributed.ReduceOp.MAX, group=shared.group)
            if not torch.equal(low, high):
                differing.append(shared.name)
        return differing


def _bits(parameter: nn.Parameter) -> Tensor:
    """The bit patterns as integers: as numbers, 0.0 equals -0.0 and a NaN differs from its copy."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    bits = parameter.detach().view(integers)
    return bits.int() if integers is torch.int16 else bits  # no backend reduces 16-bit integers


def _end_groups(groups: list[torch.distributed.ProcessGroup]) -> None:
    for group in groups:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group(group)


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient


def _mark(parameter: nn.Parameter, *, is_counted: bool) -> None:
    # megatron-core reads both: a bucket of its own under the distributed optimizer, and one count in norms.
    parameter.shared_embedding = True  # type: ignore[attr-defined]
    if not is_counted:
        parameter.shared = True  # type: ignore[attr-defined]


def _create_group(pp_ranks: tuple[int, ...], groups: ParallelGroups) -> torch.distributed.ProcessGroup | None:
    """The group of these stages in this rank's pipeline; every rank creates every pipeline's group."""
    if len(pp_ranks) == 1:
        return None
    pipelines = [
        [start + stage * groups.tp_size * groups.dp_size for stage in pp_ranks]
        for start in range(groups.tp_size * groups.dp_size)
    ]
    created = [new_group(ranks, groups.timeout) for ranks in pipelines]
    return next((group for group in created if group is not None), None)
