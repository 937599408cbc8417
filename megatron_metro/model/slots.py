"""Hidden states at slots: what heads and last layers read instead of whole sequences.

Shape letters: s positions (the rank's shard under sequence parallelism), b sequences, h width, m slots.
"""

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_metro.batch import Microbatch
from megatron_metro.parallel.groups import ProcessGroup


def gather_slots(hidden_SBH: Tensor, slots_BM: Tensor, config: TransformerConfig, tp_group: ProcessGroup) -> Tensor:
    """Hidden states at slots, [m, b, h], alike on all tensor-parallel ranks.

    An unused slot (one past the end) reads some row; its loss has weight zero. Under sequence parallelism a rank
    contributes the rows of its shard and one all-reduce adds them up: the sequence itself is never gathered.
    """
    rows = _local_rows(hidden_SBH, slots_BM, config, tp_group)
    return reduce_from_tensor_model_parallel_region(rows, group=tp_group) if config.sequence_parallel else rows


def shorten_to_slots(hidden_SBH: Tensor, slots_BM: Tensor, config: TransformerConfig, tp_group: ProcessGroup) -> Tensor:
    """The sequence of m slots in place of the s positions, sharded alike: [m, b, h], or the rank's [m / tp, b, h]."""
    rows = _local_rows(hidden_SBH, slots_BM, config, tp_group)
    return reduce_scatter_to_sequence_parallel_region(rows, group=tp_group) if config.sequence_parallel else rows


def gather_shortened(slots_MBH: Tensor, config: TransformerConfig, tp_group: ProcessGroup) -> Tensor:
    """A sequence of slots whole on every tensor-parallel rank, for a head that treats them alike: [m, b, h]."""
    if not config.sequence_parallel:
        return slots_MBH
    return gather_from_sequence_parallel_region(slots_MBH, tensor_parallel_output_grad=False, group=tp_group)


def _local_rows(hidden_SBH: Tensor, slots_BM: Tensor, config: TransformerConfig, tp_group: ProcessGroup) -> Tensor:
    """[m, b, h]: the rows this rank holds, and zeros for those of other ranks."""
    local_length, b, h = hidden_SBH.shape
    slots_MB = slots_BM.t()
    if config.sequence_parallel:
        slots_MB = slots_MB - tp_group.rank() * local_length
    is_mine_MB = (slots_MB >= 0) & (slots_MB < local_length)
    flat = slots_MB.clamp(0, local_length - 1) * b + torch.arange(b, device=slots_MB.device)
    rows = hidden_SBH.reshape(local_length * b, h).index_select(0, flat.flatten()).view(-1, b, h)
    return rows * is_mine_MB[..., None].to(rows.dtype) if config.sequence_parallel else rows


def fill_slots(tokens_BS: Tensor, slots_BG: Tensor, fills_BG: Tensor) -> Tensor:
    """Tokens with the fills written at the slots; unused slots write to a dump column past the end."""
    dump = tokens_BS.new_zeros(tokens_BS.shape[0], 1)
    return torch.cat([tokens_BS, dump], dim=1).scatter(1, slots_BG, fills_BG)[:, :-1]


def mark_real_positions(microbatch: Microbatch) -> Tensor:
    """Bool [b, s], False at the encoder's padding."""
    if microbatch.encoder_padding is None:
        return torch.ones_like(microbatch.encoder_tokens, dtype=torch.bool)
    return ~microbatch.encoder_padding
