"""Replaced-token detection: loss and accuracies (reference section 4). All tensors of one call have one shape."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True, slots=True)
class RtdHits:
    """Counts of real tokens whose verdict is right; int64 scalars."""

    replaced_correct: Tensor
    unreplaced_correct: Tensor


def sum_rtd_loss(logits: Tensor, is_replaced: Tensor, is_real: Tensor) -> Tensor:
    """Binary cross-entropy in nats summed over the real tokens: a scalar, FP32 or, for FP64 logits, FP64."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = functional.binary_cross_entropy_with_logits(wide, is_replaced.to(wide.dtype), reduction="none")
    return losses.masked_fill(~is_real, 0).sum()


def count_rtd_hits(logits: Tensor, is_replaced: Tensor, is_real: Tensor) -> RtdHits:
    """A token is called replaced where its logit is >= 0, as in the reference."""
    called_replaced = logits >= 0
    replaced, unreplaced = is_replaced & is_real, ~is_replaced & is_real
    return RtdHits(
        replaced_correct=(replaced & called_replaced).sum(),
        unreplaced_correct=(unreplaced & ~called_replaced).sum(),
    )
