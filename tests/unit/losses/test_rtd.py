"""Replaced-token detection against torch's own loss and counts by hand."""

import pytest
import torch
from torch.nn import functional

from megatron_metro.losses.rtd import count_rtd_hits, sum_rtd_loss


def make_case():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    is_replaced = torch.rand(7, 5, generator=generator) < 0.4
    is_real = torch.rand(7, 5, generator=generator) < 0.8
    return logits, is_replaced, is_real


def test_loss_sums_over_real_tokens_only():
    logits, is_replaced, is_real = make_case()
    logits[~is_real] = 1e300  # whatever stands at padding
    logits.requires_grad_()
    loss = sum_rtd_loss(logits, is_replaced, is_real)
    loss.backward()
    expected = functional.binary_cross_entropy_with_logits(
        logits.detach()[is_real], is_replaced[is_real].double(), reduction="sum"
    )
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert not logits.grad[~is_real].any()
    slope = torch.sigmoid(logits.detach()) - is_replaced.double()
    assert torch.allclose(logits.grad[is_real], slope[is_real], rtol=0, atol=1e-14)


def test_low_precision_logits_are_widened():
    logits, is_replaced, is_real = make_case()
    assert sum_rtd_loss(logits.bfloat16(), is_replaced, is_real).dtype == torch.float32


def test_hits():
    logits = torch.tensor([0.0, -1.0, 2.0, -3.0, 5.0, -5.0])
    is_replaced = torch.tensor([True, True, False, False, True, False])
    is_real = torch.tensor([True, True, True, True, False, False])
    hits = count_rtd_hits(logits, is_replaced, is_real)
    assert (int(hits.replaced_correct), int(hits.unreplaced_correct)) == (1, 1)  # a logit of 0 says replaced
