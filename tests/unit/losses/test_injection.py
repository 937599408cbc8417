"""A loss attached to an activation trains as if it were added to the loss at the end."""

import pytest
import torch

from megatron_metro.losses.injection import inject_loss


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_gradients_equal_those_of_the_sum(scale):
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64)

    def stage(weight):
        hidden = x @ weight
        return hidden, (hidden.sin() ** 2).sum()

    hidden, early = stage(w)
    injected = inject_loss(hidden, early, torch.tensor([scale]))
    assert torch.equal(injected, hidden)
    (mine,) = torch.autograd.grad((injected.cos().sum()) * scale, w)
    hidden, early = stage(w)
    (expected,) = torch.autograd.grad((hidden.cos().sum() + early) * scale, w)
    assert torch.allclose(mine, expected, rtol=1e-12, atol=0)


def test_a_low_precision_activation_carries_an_fp32_loss():
    weight = torch.randn(4, requires_grad=True)
    hidden = torch.randn(4, dtype=torch.bfloat16, requires_grad=True)
    injected = inject_loss(hidden, (weight * 3).sum(), torch.tensor(2.0))
    assert injected.dtype == torch.bfloat16
    injected.backward(torch.ones_like(injected))
    assert torch.equal(hidden.grad, torch.ones_like(hidden))
    assert torch.equal(weight.grad, torch.full((4,), 6.0))


def test_without_gradients_it_is_the_identity():
    with torch.no_grad():
        hidden = torch.randn(3)
        assert torch.equal(inject_loss(hidden, torch.tensor(1.0), torch.tensor(1.0)), hidden)
