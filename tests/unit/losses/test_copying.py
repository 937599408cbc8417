"""The copy mechanism in log space against plain probabilities, and where those would underflow."""

import torch

from megatron_metro.losses.copying import mix_losses, prefers_input


def test_mixture_equals_plain_probabilities_and_its_gradient():
    generator = torch.Generator().manual_seed(1)
    nll = torch.rand(50, generator=generator, dtype=torch.float64).mul(5).requires_grad_()
    gates = torch.randn(50, generator=generator, dtype=torch.float64).mul(3).requires_grad_()
    is_input = torch.rand(50, generator=generator) < 0.5
    losses = mix_losses(nll, gates, is_input)
    copied = torch.sigmoid(gates)
    expected = -torch.log(copied * is_input + torch.sigmoid(-gates) * torch.exp(-nll))
    assert torch.allclose(losses, expected, rtol=0, atol=1e-13)
    weights = torch.rand(50, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad((losses * weights).sum(), (nll, gates))
    for a, b in zip(found, torch.autograd.grad((expected * weights).sum(), (nll, gates))):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)


def test_extreme_gates_and_losses_stay_finite():
    nll = torch.tensor([1000.0, 1000.0, 2.0, 2.0]).requires_grad_()
    gates = torch.tensor([-500.0, 500.0, -500.0, 500.0]).requires_grad_()
    losses = mix_losses(nll, gates, torch.tensor([True, True, True, False]))
    assert losses.tolist() == [500.0, 0.0, 2.0, 502.0]
    losses.sum().backward()
    assert torch.isfinite(nll.grad).all() and torch.isfinite(gates.grad).all()


def test_the_input_wins_where_it_is_more_likely():
    probs = torch.tensor([[0.7, 0.3], [0.7, 0.3], [0.5, 0.5]], dtype=torch.float64)  # of the best, of the input
    copied = torch.tensor([0.2, 0.3, 1e-9], dtype=torch.float64)  # 0.56 against 0.44; 0.49 against 0.51; a tie broken
    gates = torch.logit(copied)
    assert prefers_input(probs[:, 0].log(), probs[:, 1].log(), gates).tolist() == [False, True, True]
