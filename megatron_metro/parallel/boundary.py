"""BoundaryPayload: the named tensors that cross a stage edge, packed into the one tensor the schedules know.

Shape letters: s encoder rows and t decoder rows (shards under sequence parallelism), b sequences, h width, g masked
slots. Sampled ids and the weights sigmoid(z) travel as base-256 digits, whole numbers that BF16 and FP16 hold exactly.
"""

from dataclasses import dataclass

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_metro.config.payload import PayloadRows


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundaryPayload:
    """What a piece hands to the next one; parts that do not exist yet at this point of the chain are None."""

    hidden: Tensor  # [s or t, b, h] states of the running network
    encoder_output: Tensor | None = None  # [s, b, h] from the decoder embedding on
    sampled_ids: Tensor | None = None  # int64 [b, g] the generator's fills
    replaced_prob: Tensor | None = None  # float32 [b, g] sigmoid of the RTD logit at the masked slots


def pack(payload: BoundaryPayload, rows: PayloadRows) -> Tensor:
    """The message [rows.total, b, h]: a fresh and contiguous tensor, since the schedules free it and refuse views."""
    parts = [payload.hidden]
    if rows.encoder_output:
        assert payload.encoder_output is not None
        parts.append(payload.encoder_output)
    if rows.aux:
        parts.append(_pack_aux(payload, rows))
    if len(parts) > 1:
        return torch.cat(parts)
    # A tensor object of its own: emptying it must not empty what an operation of this piece has saved for its backward.
    # Embeddings alone (T5's, on no position table) are a transposed view, which cannot be sent.
    hidden = payload.hidden.contiguous().view_as(payload.hidden)
    return make_viewless_tensor(inp=hidden, requires_grad=hidden.requires_grad, keep_graph=True)


def unpack(message: Tensor, rows: PayloadRows, num_masked_slots: int) -> BoundaryPayload:
    """The inverse of `pack`; ids and probabilities come back without a graph, so their rows get a zero gradient."""
    hidden, encoder_output, aux = message.split([rows.hidden, rows.encoder_output, rows.aux])
    sampled_ids, replaced_prob = None, None
    if rows.aux:
        digits = _unpack_digits(aux.detach(), num_masked_slots, rows.num_id_digits + rows.num_weight_digits)
        sampled_ids = _digits_to_ids(digits[..., : rows.num_id_digits])
        if rows.num_weight_digits:
            replaced_prob = _bytes_to_float(digits[..., rows.num_id_digits :])
    return BoundaryPayload(
        hidden=hidden,
        encoder_output=encoder_output if rows.encoder_output else None,
        sampled_ids=sampled_ids,
        replaced_prob=replaced_prob,
    )


def _pack_aux(payload: BoundaryPayload, rows: PayloadRows) -> Tensor:
    assert payload.sampled_ids is not None
    powers = 256 ** torch.arange(rows.num_id_digits, device=payload.sampled_ids.device)
    digits = (payload.sampled_ids[..., None] // powers) % 256
    if rows.num_weight_digits:
        assert payload.replaced_prob is not None and payload.replaced_prob.dtype == torch.float32
        bytes_ = payload.replaced_prob.contiguous()[..., None].view(torch.uint8)
        digits = torch.cat([digits, bytes_.to(digits.dtype)], dim=-1)
    b, h = payload.hidden.shape[1:]
    flat = payload.hidden.new_zeros(b, rows.aux * h)
    flat[:, : digits[0].numel()] = digits.flatten(1).to(flat.dtype)
    return flat.view(b, rows.aux, h).transpose(0, 1)


def _unpack_digits(aux: Tensor, num_slots: int, num_digits: int) -> Tensor:
    b = aux.shape[1]
    flat = aux.transpose(0, 1).reshape(b, -1)[:, : num_slots * num_digits]
    return flat.round().to(torch.int64).view(b, num_slots, num_digits)


def _digits_to_ids(digits: Tensor) -> Tensor:
    powers = 256 ** torch.arange(digits.shape[-1], device=digits.device)
    return (digits * powers).sum(-1)


def _bytes_to_float(digits: Tensor) -> Tensor:
    return digits.to(torch.uint8).contiguous().view(torch.float32).squeeze(-1)
