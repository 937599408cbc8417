"""Adafactor (Shazeer and Stern 2018) with torch.optim.Adafactor's arithmetic, on matrices sharded over ranks.

A matrix is updated as the whole one would be, whatever the layout: sums over rows, columns and all elements go over the
tensor-parallel group in float64, the same order on every rank. Statistics belong to a logical matrix: queries, keys and
values of a fused projection have column factors, scales and clipping of their own, as have the two halves of a gated
feed-forward layer, and rows that only pad the vocabulary count nowhere. So a fused weight moves as T5's separate ones.

Data-parallel ranks share the work: each holds the state of some whole parameters, updates them and hands them out.

Differences from torch.optim.Adafactor, all within rounding or by flags: `--adafactor-eps1` is 1e-15, the root of T5's
1e-30, where torch takes the machine epsilon (1.2e-7 in FP32 exceeds the mean squared gradient of ordinary models, to
which torch compares it); the row factor is divided by its mean before the product, which may otherwise underflow;
gradients are consumed: they hold the updates afterwards.

Shape letters: g blocks of rows, p logical matrices, r rows of one of them in a block, c columns.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_metro.config.schema import OptimizerConfig
from megatron_metro.parallel.groups import ParallelGroups, all_gather, broadcast

_BY_HEAD = {"linear_qkv": 3, "linear_kv": 2}
_Entry: TypeAlias = ShardedTensor | ShardedTensorFactory | None  # None: nothing but padding of the vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What a rank holds of one parameter, seen as logical matrices; a vector is a matrix of one column."""

    num_matrices: int
    rows_per_block: int  # rows of one logical matrix that stand together
    num_rows: int  # of this rank, padding excluded
    matrix_rows: int  # of one whole logical matrix, padding excluded
    matrix_columns: int
    is_factored: bool
    sharded_dim: int | None  # None where every tensor-parallel rank holds the whole
    owner: int  # the data-parallel rank that holds the state and computes the update

    def view(self, tensor: Tensor) -> Tensor:
        """[g, p, r, c] of a tensor shaped as the parameter, without padding."""
        rows = tensor.detach().view(tensor.shape[0] if tensor.dim() else 1, -1)[: self.num_rows]
        return rows.view(-1, self.num_matrices, self.rows_per_block, rows.shape[1])


@dataclass(slots=True)
class _Sums:
    """Sums over this rank's elements, then over all; float64."""

    rows: Tensor  # [g, p, r] of squared gradients
    columns: Tensor  # [p, c] of squared gradients
    weights: Tensor  # [p] of squared weights


class Adafactor(torch.optim.Optimizer):
    """The update of all parameters of a rank; collective over its tensor-parallel and data-parallel groups."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        parts: Sequence[Part],
        config: OptimizerConfig,
        groups: ParallelGroups,
    ) -> None:
        super().__init__(parameters, {"lr": 0.0, "step": 0})
        self.parts = dict(zip(parameters, parts, strict=True))
        self._config, self._groups = config, groups

    def prepare_state(self) -> None:
        """Zero statistics for the parameters this rank owns; does nothing where they exist."""
        for parameter, part in self._owned():
            if self.state[parameter]:
                continue
            columns = parameter.shape[1] if part.is_factored else 1
            shapes = {"row_var": (part.num_rows,), "col_var": (part.num_matrices, columns)}
            if not part.is_factored:
                shapes = {"variance": (part.num_rows,)}
            self.state[parameter].update({name: parameter.new_zeros(shape) for name, shape in shapes.items()})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update from the parameters' `grad`."""
        self.prepare_state()
        (group,) = self.param_groups
        group["step"] += 1
        owned = self._owned()
        weights = [part.view(parameter) for parameter, part in owned]
        updates = [part.view(gradient) for parameter, part in owned if (gradient := parameter.grad) is not None]
        assert len(updates) == len(owned), "core gives every parameter a gradient"
        sums = self._sum_squares(weights, updates)
        eps1, new_weight = self._config.adafactor_eps1, group["step"] ** -self._config.adafactor_decay_rate
        for (parameter, part), update, total in zip(owned, updates, sums):
            second_moment = _update_statistics(part, self.state[parameter], update, total, new_weight, eps1)
            update.mul_(second_moment.clamp_(min=eps1**2).rsqrt_())
        squares = [_sum_matrices(update.square()) for update in updates]
        squares = self._add_ranks(squares, [part for _, part in owned])
        for (_, part), weight, update, total, square in zip(owned, weights, updates, sums, squares):
            step_size = self._step_size(part, total.weights, square)
            if self._config.weight_decay:
                weight.mul_(1.0 - group["lr"] * self._config.weight_decay)
            weight.addcmul_(update, step_size.to(update.dtype).view(1, -1, 1, 1), value=-1.0)
        self._hand_out()

    def _owned(self) -> list[tuple[nn.Parameter, Part]]:
        return [(key, part) for key, part in self.parts.items() if part.owner == self._groups.dp_rank]

    def _sum_squares(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[_Sums]:
        """Row, column and weight sums of the whole matrices, one entry per owned parameter."""
        sums = []
        for weight, gradient in zip(weights, gradients):
            squares = gradient.square()
            sums.append(_Sums(squares.sum(3).double(), squares.sum((0, 2)).double(), _sum_matrices(weight.square())))
        parts = [part for _, part in self._owned()]
        across = [total.rows if part.sharded_dim == 1 else total.columns for part, total in zip(parts, sums)]
        whole = iter(self._add_ranks([*across, *(total.weights for total in sums)], [*parts, *parts]))
        for part, total in zip(parts, sums):
            if part.sharded_dim == 1:
                total.rows = next(whole)
            else:
                total.columns = next(whole)
        for total in sums:
            total.weights = next(whole)
        return sums

    def _add_ranks(self, sums: Sequence[Tensor], parts: Sequence[Part]) -> list[Tensor]:
        """The sums over the tensor-parallel group; those of replicated parameters are whole already."""
        partial = [total for total, part in zip(sums, parts) if part.sharded_dim is not None]
        if not partial:
            return list(sums)
        # Added in the order of the ranks wherever a number stands: a reduction may choose its order by the place in the
        # message, which differs between the stages that hold copies of one weight, and copies stay bit-equal.
        whole, *others = all_gather(torch.cat([total.flatten() for total in partial]), self._groups.tp_group)
        for other in others:
            whole += other
        found = iter(whole.split([total.numel() for total in partial]))
        return [total if part.sharded_dim is None else next(found).view_as(total) for total, part in zip(sums, parts)]

    def _step_size(self, part: Part, weight_squares: Tensor, update_squares: Tensor) -> Tensor:
        """[p]: the relative step, scaled by the matrix and by the clipping of its update."""
        config, (group,) = self._config, self.param_groups
        size = part.matrix_rows * part.matrix_columns
        step_size = min(group["lr"], group["step"] ** -0.5) if config.adafactor_relative_step else group["lr"]
        clipping = ((update_squares / size).sqrt() / config.adafactor_clip_threshold).clamp(min=1.0)
        if not config.adafactor_scale_parameter:
            return step_size / clipping
        return (weight_squares / size).sqrt().clamp(min=config.adafactor_eps2) * step_size / clipping

    def _hand_out(self) -> None:
        """Every data-parallel rank gets the parameters that others have updated."""
        groups = self._groups
        if groups.dp_size == 1:
            return
        for owner in range(groups.dp_size):
            parameters = [parameter for parameter, part in self.parts.items() if part.owner == owner]
            if not parameters:
                continue
            flat = broadcast(torch.cat([p.detach().flatten() for p in parameters]), owner, groups.dp_group)
            if owner == groups.dp_rank:
                continue
            for parameter, values in zip(parameters, flat.split([p.numel() for p in parameters])):
                parameter.copy_(values.view_as(parameter))


def list_parts(chunks: Sequence[DistributedDataParallel], groups: ParallelGroups) -> dict[nn.Parameter, Part]:
    """How each parameter of this rank's chunks is to be updated, and by whom."""
    named = [(name, p) for chunk in chunks for name, p in unwrap_model(chunk).named_parameters()]
    owners = assign_owners([(name, p.numel(), hasattr(p, "shared_embedding")) for name, p in named], groups.dp_size)
    described = [entry for chunk in chunks for entry in _with_surroundings(unwrap_model(chunk))]
    return {
        parameter: _describe(name, parameter, module, entry, groups, owner)
        for (name, parameter), (module, entry), owner in zip(named, described, owners, strict=True)
    }


def assign_owners(parameters: Iterable[tuple[str, int, bool]], num_ranks: int) -> list[int]:
    """A data-parallel rank for each (name, size, whether shared by stages): largest first, to the least loaded.

    The owner of a shared weight follows from its name, so that all its copies are updated from one rank's gradients.
    """
    listed = list(parameters)
    loads, owners = [0] * num_ranks, [0] * len(listed)
    order = sorted(range(len(listed)), key=lambda index: (not listed[index][2], -listed[index][1]))
    for index in order:
        name, size, is_shared = listed[index]
        owner = zlib.crc32(name.encode()) % num_ranks if is_shared else loads.index(min(loads))
        owners[index] = owner
        loads[owner] += size
    return owners


def _with_surroundings(chunk: MegatronModule) -> list[tuple[MegatronModule, _Entry]]:
    """For each of `named_parameters` the module it is an attribute of, and what a checkpoint knows of it."""
    sharded = chunk.sharded_state_dict(prefix="")
    return [(chunk.get_submodule(name.rpartition(".")[0]), sharded.get(name)) for name, _ in chunk.named_parameters()]


def _describe(
    name: str,
    parameter: nn.Parameter,
    module: MegatronModule,
    entry: _Entry,
    groups: ParallelGroups,
    owner: int,
) -> Part:
    assert parameter.dim() <= 2 and parameter.is_contiguous(), f"{name}: {tuple(parameter.shape)}"
    is_sharded = getattr(parameter, "tensor_model_parallel", False) and groups.tp_size > 1
    sharded_dim: int | None = parameter.partition_dim if is_sharded else None  # type: ignore[attr-defined]
    num_rows, num_columns = (*parameter.shape, 1, 1)[:2]
    all_rows = num_rows * (groups.tp_size if sharded_dim == 0 else 1)
    if isinstance(entry, ShardedTensor) and parameter.dim():  # rows that pad the vocabulary are in no checkpoint
        num_rows, all_rows = entry.local_shape[0], entry.global_shape[0]
    elif entry is None:
        num_rows = 0
    leaf, num_matrices, rows_per_block = name.split(".")[-2:][0], 1, max(num_rows, 1)
    if leaf in _BY_HEAD:
        num_matrices, rows_per_block = _BY_HEAD[leaf], module.config.kv_channels
    elif isinstance(entry, ShardedTensorFactory):  # the two halves of a gated layer
        num_matrices, rows_per_block = 2, num_rows // 2
    return Part(
        num_matrices=num_matrices,
        rows_per_block=rows_per_block,
        num_rows=num_rows,
        matrix_rows=all_rows // num_matrices,
        matrix_columns=num_columns * (groups.tp_size if sharded_dim == 1 else 1),
        is_factored=parameter.dim() == 2,
        sharded_dim=sharded_dim,
        owner=owner,
    )


def _sum_matrices(values: Tensor) -> Tensor:
    """[g, p, r, c] to [p] in float64."""
    return values.sum((0, 2, 3)).double()


def _update_statistics(
    part: Part, state: dict[str, Tensor], gradient: Tensor, sums: _Sums, new_weight: float, smallest_mean: float
) -> Tensor:
    """Fold the squared gradient into the statistics; the second moment they stand for, a fresh [g, p, r, c]."""
    if not part.is_factored:
        variance = state["variance"].view_as(gradient).lerp_(gradient.square(), new_weight)
        return variance.clone()
    rows, columns = state["row_var"].view_as(sums.rows), state["col_var"]
    rows.lerp_((sums.rows / part.matrix_columns).to(rows.dtype), new_weight)
    columns.lerp_((sums.columns / part.matrix_rows).to(columns.dtype), new_weight)
    # The mean of the row factor is that of the column factor too: taken from the one that this rank holds whole.
    mean = columns.mean(1) if part.sharded_dim == 0 else rows.mean((0, 2))
    scaled_rows = rows / mean.clamp(min=smallest_mean)[:, None]
    return scaled_rows[..., None] * columns[None, :, None, :]
