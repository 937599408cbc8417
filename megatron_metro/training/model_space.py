"""Weights and optimizer state as pieces of whole-model tensors, which any layout can write and any other can read.

Core's own paths do not meet: the plain optimizers and the distributed one use different keys, the latter's
`fully_reshardable` form fails with torch's Adam, and flattened shards are no longer supported. Here every state tensor
takes the place of its parameter in the model. A data-parallel rank of the distributed optimizer owns a flat range of a
parameter; a range of a row-major tensor is a handful of boxes (part of a row, whole rows, part of a row), which the
checkpoint format stores as they are. So nothing is gathered, and every rank writes and reads only its own.

Keys: `<parameter name>` holds the weights, from the FP32 main weights where there are some (BF16 and FP16 ones are
their rounding), `optimizer.state.exp_avg.<name>` and `optimizer.state.exp_avg_sq.<name>` Adam's moments. Adafactor has
`variance` of a vector, `row_var` [rows] of a matrix and `col_var` [logical matrices fused in it, columns], each written
by the data-parallel rank that owns it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_metro.checkpoint.reader import OPTIMIZER_PREFIX
from megatron_metro.training.adafactor import Adafactor, Part

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """A row-major block of a local parameter and where it lies in the whole model's tensor."""

    key: str
    start: int  # first element of the block in the flattened local parameter
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    replica_id: tuple[int, ...]  # (copy of a shared weight, tensor-parallel copy, data-parallel rank); 0s are written


@dataclass(frozen=True, kw_only=True, slots=True)
class _LocalState:
    """The range of a flattened local parameter whose optimizer state this rank owns, and that state, flat."""

    start: int
    stop: int
    main: Tensor
    moments: Mapping[str, Tensor]
    is_data_parallel_shard: bool
    part: Part | None = None  # with Adafactor, whose factors lie otherwise than the parameter


def tensors_to_save(
    chunks: Sequence[nn.Module], optimizer: MegatronOptimizer, *, with_moments: bool
) -> list[ShardedTensor]:
    """Weights, and the optimizer's moments if wanted, as this rank holds them."""
    prepare_state(optimizer)
    parameters = list(_parameters(chunks))
    states = _local_states(optimizer, (parameter for parameter, _ in parameters))
    pieces: list[ShardedTensor] = []
    for parameter, places in parameters:
        if (state := states.get(parameter)) is None:
            continue
        pieces += _pieces(places, state.main, state, "")
        if with_moments:
            pieces += _moment_pieces(places, state)
    return pieces


def tensors_to_load(
    chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None, *, with_moments: bool
) -> list[ShardedTensor]:
    """The live weights, main weights and (if wanted) moments; loading writes into them.

    Rows of the padded vocabulary are in no checkpoint: they keep the zeros they were built with.
    """
    parameters = list(_parameters(chunks))
    states: dict[nn.Parameter, _LocalState] = {}
    if optimizer is not None:
        prepare_state(optimizer)
        states = _local_states(optimizer, (parameter for parameter, _ in parameters))
    pieces: list[ShardedTensor] = []
    for parameter, places in parameters:
        flat = parameter.detach().view(-1)
        whole = _LocalState(start=0, stop=flat.numel(), main=flat, moments={}, is_data_parallel_shard=False)
        pieces += _pieces(places, flat, whole, "")
        if (state := states.get(parameter)) is None:
            continue
        if state.main.dtype != parameter.dtype:
            pieces += _pieces(places, state.main, state, "")
        if with_moments:
            pieces += _moment_pieces(places, state)
    return pieces


def number(tensors: Sequence[ShardedTensor]) -> dict[str, ShardedTensor]:
    """The state dict of a flat list: core wants names, and reads the keys of the tensors."""
    return {str(index): tensor for index, tensor in enumerate(tensors)}


def device_kind(chunks: Sequence[nn.Module]) -> str:
    """Where the model is: cuda or cpu."""
    return next(chunks[0].parameters()).device.type


def get_num_updates(optimizer: MegatronOptimizer) -> int:
    """The optimizer's step count: one number for all parameters.

    torch's AdamW counts beside the moments; NVIDIA's in the parameter group, as a number or (capturable) a tensor, and
    Transformer Engine's not in groups of which this rank owns nothing.
    """
    adam = optimizer.optimizer
    if isinstance(adam, torch.optim.AdamW):
        counts = {int(state["step"]) for state in adam.state.values() if "step" in state}
    else:
        counts = {int(group["step"]) for group in adam.param_groups if group["params"] and "step" in group}
    assert len(counts) <= 1, f"parameters disagree about the number of updates: {sorted(counts)}"
    return counts.pop() if counts else 0


def set_num_updates(optimizer: MegatronOptimizer, num_updates: int) -> None:
    """Set the optimizer's step count after loading its moments."""
    prepare_state(optimizer)
    adam = optimizer.optimizer
    for group in adam.param_groups:
        if not isinstance(adam, torch.optim.AdamW):
            step = group.get("step")
            group["step"] = step.fill_(num_updates) if isinstance(step, Tensor) else num_updates
            continue
        for parameter in group["params"]:
            adam.state[parameter]["step"].fill_(float(num_updates))


def prepare_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter the zero moments that the first update would create; does nothing where they exist."""
    adam = optimizer.optimizer
    optimizer.init_state_fn(adam, optimizer.config)
    if not isinstance(adam, torch.optim.AdamW):
        return
    for group in adam.param_groups:
        for parameter in group["params"]:
            # torch keeps the count beside the moments, on the device only for the fused kernel.
            device = parameter.device if group["fused"] else torch.device("cpu")
            adam.state[parameter].setdefault("step", torch.zeros((), dtype=torch.float32, device=device))


def row_major_boxes(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Cut the flat range [start, stop) of a row-major tensor into boxes: (offset, shape, flat start) of each.

    At most 2 x dimensions - 1 boxes; the whole range is one.
    """
    if start >= stop:
        return
    if not shape:
        yield (), (), 0
        return
    row = math.prod(shape[1:])
    first_whole, last_whole = -(-start // row), stop // row
    if first_whole > last_whole:  # within one row
        yield from _boxes_in_row(shape, start // row, start, stop)
        return
    if start % row:
        yield from _boxes_in_row(shape, start // row, start, first_whole * row)
    if first_whole < last_whole:
        rest = shape[1:]
        yield (first_whole, *(0 for _ in rest)), (last_whole - first_whole, *rest), first_whole * row
    if stop % row:
        yield from _boxes_in_row(shape, last_whole, last_whole * row, stop)


def _boxes_in_row(
    shape: tuple[int, ...], index: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    base = index * math.prod(shape[1:])
    for offset, size, begin in row_major_boxes(shape[1:], start - base, stop - base):
        yield (index, *offset), (1, *size), base + begin


def _parameters(chunks: Sequence[nn.Module]) -> Iterator[tuple[nn.Parameter, list[_Place]]]:
    """Every parameter of this rank with its places, chunk by chunk; a shared weight comes once per copy."""
    for chunk in chunks:
        module: MegatronModule = unwrap_model(chunk)
        sharded = module.sharded_state_dict(prefix="")
        for name, parameter in module.named_parameters():
            if name in sharded:  # a rank may hold nothing but padding of the vocabulary
                yield parameter, [_place(piece, parameter) for piece in _sharded_tensors(sharded[name])]


def _sharded_tensors(entry: Any) -> Iterable[ShardedTensor]:
    """A factory (two halves of a gated projection) stands for several pieces of one parameter."""
    if isinstance(entry, ShardedTensor):
        return [entry]
    assert isinstance(entry, ShardedTensorFactory), f"a parameter is described by {type(entry).__name__}"
    built = entry.build()
    return built.values() if isinstance(built, dict) else built


def _place(piece: ShardedTensor, parameter: nn.Parameter) -> _Place:
    data = piece.data
    assert data is not None and data.is_contiguous(), f"{piece.key}: a piece is a contiguous view of its parameter"
    assert data.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr(), f"{piece.key}: not a view"
    assert piece.prepend_axis_num == 0 and not piece.allow_shape_mismatch, f"{piece.key}: save the unpadded shape"
    assert isinstance(piece.replica_id, tuple) and len(piece.replica_id) == 3, f"{piece.key}: {piece.replica_id}"
    return _Place(
        key=piece.key,
        start=data.storage_offset() - parameter.storage_offset(),
        shape=tuple(piece.local_shape),
        global_shape=tuple(piece.global_shape),
        global_offset=tuple(piece.global_offset),
        replica_id=piece.replica_id,
    )


def _local_states(optimizer: MegatronOptimizer, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, _LocalState]:
    """Optimizer state by model parameter; parameters whose state lies on other data-parallel ranks are absent."""
    if not isinstance(optimizer, DistributedOptimizer):
        return {
            parameter: _state_of(optimizer, getattr(parameter, "main_param", parameter), 0, is_shard=False)
            for parameter in parameters
        }
    model_groups = (*optimizer.model_float16_groups, *optimizer.model_fp32_groups)
    main_groups = (*optimizer.shard_fp32_from_float16_groups, *optimizer.shard_fp32_groups)
    states = {}
    for parameter, main in zip(chain(*model_groups), chain(*main_groups), strict=True):
        owned = optimizer._get_model_param_range_map(parameter)["param"]
        assert owned.size == main.numel(), "core's shard and its range disagree"
        states[parameter] = _state_of(optimizer, main, owned.start, is_shard=True)
    return states


def _state_of(optimizer: MegatronOptimizer, main: Tensor, start: int, *, is_shard: bool) -> _LocalState:
    inner = optimizer.optimizer
    is_adafactor = isinstance(inner, Adafactor)
    state = inner.state.get(main, {})  # of an Adafactor nothing where another data-parallel rank owns the parameter
    return _LocalState(
        start=start,
        stop=start + main.numel(),
        main=main.detach().view(-1),
        moments={name: state[name].view(-1) for name in (state if is_adafactor else MOMENTS)},
        is_data_parallel_shard=is_shard,
        part=inner.parts[main] if is_adafactor else None,
    )


def _moment_pieces(places: Sequence[_Place], state: _LocalState) -> Iterator[ShardedTensor]:
    if state.part is not None:
        state = replace(state, is_data_parallel_shard=True)
    for name, moment in state.moments.items():
        prefix = f"{OPTIMIZER_PREFIX}{name}."
        if state.part is None or name == "variance":
            yield from _pieces(places, moment, state, prefix)
        elif name == "row_var":
            yield from _pieces([_place_of_rows(place) for place in places], moment, state, prefix)
        else:
            yield from _pieces([_place_of_columns(places[0], state.part)], moment, state, prefix)


def _place_of_rows(place: _Place) -> _Place:
    """One number for each row of a matrix, which ranks that share the row all hold."""
    return replace(
        place,
        start=place.start // place.shape[1],
        shape=place.shape[:1],
        global_shape=place.global_shape[:1],
        global_offset=place.global_offset[:1],
        replica_id=_with_tensor_copy(place.replica_id, place.global_offset[1]),
    )


def _place_of_columns(place: _Place, part: Part) -> _Place:
    """One row for each logical matrix of a parameter, which ranks that share its columns all hold."""
    return replace(
        place,
        start=0,
        shape=(part.num_matrices, place.shape[1]),
        global_shape=(part.num_matrices, place.global_shape[1]),
        global_offset=(0, place.global_offset[1]),
        replica_id=_with_tensor_copy(place.replica_id, place.global_offset[0]),
    )


def _with_tensor_copy(replica_id: tuple[int, ...], offset: int) -> tuple[int, ...]:
    """`offset` tells tensor-parallel ranks apart that hold copies; only 0 is written."""
    return (replica_id[0], replica_id[1] or offset, *replica_id[2:])


def _pieces(places: Iterable[_Place], flat: Tensor, state: _LocalState, prefix: str) -> Iterator[ShardedTensor]:
    """The part of `flat` (elements state.start to state.stop of the parameter) that lies in each place."""
    for place in places:
        start = max(state.start, place.start)
        stop = min(state.stop, place.start + math.prod(place.shape))
        for offset, shape, begin in row_major_boxes(place.shape, start - place.start, stop - place.start):
            first = place.start + begin - state.start
            yield ShardedTensor(
                key=prefix + place.key,
                data=flat[first : first + math.prod(shape)].view(shape),
                dtype=flat.dtype,
                local_shape=shape,
                global_shape=place.global_shape,
                global_offset=tuple(a + b for a, b in zip(place.global_offset, offset)),
                axis_fragmentations=None,  # boxes are no regular grid
                replica_id=(*place.replica_id[:2], 0) if state.is_data_parallel_shard else place.replica_id,
            )
