"""Where each local weight lies in the whole model's tensor: what a checkpoint needs to know of a layout."""

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from torch import nn

from megatron_metro.config.schema import ModelConfig
from megatron_metro.model.weights import count_parts, has_vocabulary_rows
from megatron_metro.parallel.vocab_ops import VocabShard


def shard_parameters(
    module: nn.Module, prefix: str, model: ModelConfig, shard: VocabShard, collection: ProcessGroupCollection
) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """A view of every weight with its place, by name; padding of the vocabulary is left out.

    Read from the marks that weights carry: `tensor_model_parallel` and `partition_dim`, and `shared` on all copies of a
    shared weight but the first, so that one copy is written. A weight of two parts is two tensors one above the other
    in the whole model, of both of which this rank has its share.
    """
    state: dict[str, ShardedTensor | ShardedTensorFactory] = {}
    tp_rank, tp_size, dp_rank = collection.tp.rank(), collection.tp.size(), collection.dp_cp.rank()
    for name, parameter in module.named_parameters():
        is_sharded = getattr(parameter, "tensor_model_parallel", False)
        data, offset, global_shape = parameter.detach(), [0] * parameter.dim(), list(parameter.shape)
        if is_sharded:
            dim: int = parameter.partition_dim  # type: ignore[attr-defined]
            global_shape[dim] *= tp_size
            offset[dim] = tp_rank * parameter.shape[dim]
        if has_vocabulary_rows(name):
            data, global_shape[0] = data[: shard.num_real_columns], shard.vocab_size
        if data.numel() == 0:  # nothing but padding on this rank
            continue
        replica_id = (int(getattr(parameter, "shared", False)), 0 if is_sharded else tp_rank, dp_rank)
        if count_parts(name, model) == 2:
            whole = ShardedTensor.from_rank_offsets(prefix + name, data, (0, tp_rank, tp_size), replica_id=replica_id)
            state[prefix + name] = apply_swiglu_sharded_factory(whole, ())
            continue
        state[prefix + name] = ShardedTensor(
            key=prefix + name,
            data=data,
            dtype=data.dtype,
            local_shape=tuple(data.shape),
            global_shape=tuple(global_shape),
            global_offset=tuple(offset),
            axis_fragmentations=None,
            replica_id=replica_id,
        )
    return state
