"""The copy mechanism in log space against plain probabilities, and where those would underflow."""

import torch

from megatron_metro.losses.copying import mix_losses, prefers_input


def test_mixture_equals_plain_probabilities_and_its_gradient():
    generator = torch.Generator().manual_seed(1)
    nll = torch.rand(50, generator=generator, dtype=torch.float64).mul(5).requires_grad_()
    replaced = torch.rand(50, generator=generator, dtype=torch.float64)
    is_input = torch.rand(50, generator=generator) < 0.5
    losses = mix_losses(nll, replaced, is_input)
    expected = -torch.log((1 - replaced) * is_input + replaced * torch.exp(-nll))
    assert torch.allclose(losses, expected, rtol=0, atol=1e-13)
    weights = torch.rand(50, generator=generator, dtype=torch.float64)
    [found] = torch.autograd.grad((losses * weights).sum(), nll)
    [gradient] = torch.autograd.grad((expected * weights).sum(), nll)
    assert torch.allclose(found, gradient, rtol=0, atol=1e-13)


def test_the_lm_loss_does_not_train_the_verdicts():
    nll, logits = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([0.5, -0.5], requires_grad=True)
    mix_losses(nll, logits.sigmoid(), torch.tensor([True, False])).sum().backward()
    assert logits.grad is None and (nll.grad > 0).all()


def test_extreme_verdicts_and_losses_stay_finite():
    nll = torch.tensor([1000.0, 1000.0, 2.0, 2.0]).requires_grad_()
    replaced = torch.tensor([1.0, 0.0, 1.0, 0.0])
    losses = mix_losses(nll, replaced, torch.tensor([True, True, True, False]))
    assert losses[:3].tolist() == [1000.0, 0.0, 2.0] and 80 < losses[3] < 100
    losses.sum().backward()
    assert torch.isfinite(nll.grad).all()


def test_the_input_wins_where_it_is_more_likely():
    probs = torch.tensor([[0.7, 0.3], [0.7, 0.3], [0.5, 0.5]], dtype=torch.float64)  # of the best, of the input
    copied = torch.tensor([0.2, 0.3, 1e-9], dtype=torch.float64)  # 0.56 against 0.44; 0.49 against 0.51; a tie broken
    assert prefers_input(probs[:, 0].log(), probs[:, 1].log(), 1 - copied).tolist() == [False, True, True]
