"""What is picked from logits, against transformers' warpers and plain formulas."""

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_metro.inference.picking import pick_at_random, pick_best, pick_candidates, pick_targets
from megatron_metro.inference.writing import draw_uniforms
from megatron_metro.parallel.vocab_ops import VocabShard, largest

SHARD = VocabShard(vocab_size=300, padded_size=640)
GENERATOR = torch.Generator().manual_seed(9)
SETTINGS = [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.5, 7, 1.0), (1.0, 0, 0.7), (2.0, 40, 0.9), (1.0, 1, 1.0), (1.0, 0, 1e-6)]


def make_logits(num_rows: int) -> torch.Tensor:
    logits = torch.randn(num_rows, SHARD.padded_size, dtype=torch.float64, generator=GENERATOR) * 3
    logits[:, SHARD.vocab_size :] = 1e4  # padding must never be picked
    return logits


def warp(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Probabilities [n, vocabulary] as transformers samples from."""
    scores = TemperatureLogitsWarper(temperature)(None, logits[:, : SHARD.vocab_size])
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    return scores.softmax(-1)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_draws_follow_transformers_distribution(temperature: float, top_k: int, top_p: float) -> None:
    [row] = make_logits(1)
    [probs] = warp(row[None], temperature, top_k, top_p)
    # A uniform grid of inverse-CDF draws meets every probability to the width of the grid.
    count = 4000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    picked = pick_at_random(row.expand(count, -1), SHARD, uniforms, temperature=temperature, top_k=top_k, top_p=top_p)
    counts = torch.bincount(picked[:, 0].long(), minlength=SHARD.vocab_size)
    assert float((counts / count - probs).abs().max()) < 1.5 / count
    assert not counts[probs == 0].any()
    log_probs = row[: SHARD.vocab_size].log_softmax(-1)
    assert torch.allclose(picked[:, 1], log_probs[picked[:, 0].long()], rtol=0, atol=1e-12)


def test_the_ends_of_the_uniforms_pick_something() -> None:
    logits = make_logits(50)
    for uniform in (0.0, 1 - 2.0**-53):
        for temperature, top_k, top_p in SETTINGS:
            picked = pick_at_random(
                logits, SHARD, torch.full((50,), uniform, dtype=torch.float64),
                temperature=temperature, top_k=top_k, top_p=top_p,
            )  # fmt: skip
            assert (warp(logits, temperature, top_k, top_p).gather(1, picked[:, :1].long()) > 0).all()


def test_best_candidates_and_targets_equal_torch() -> None:
    logits = make_logits(20)
    log_probs = logits[:, : SHARD.vocab_size].log_softmax(-1)
    best = pick_best(logits, SHARD)
    assert torch.equal(best[:, 0].long(), log_probs.argmax(-1))
    values, ids = log_probs.topk(9)
    found_ids, found = pick_candidates(logits, SHARD, 9).chunk(2, dim=1)
    assert torch.equal(found_ids.long(), ids)
    assert torch.allclose(found, values, rtol=0, atol=1e-12)
    targets = torch.randint(SHARD.vocab_size, (20,), generator=GENERATOR)
    expected = log_probs.gather(1, targets[:, None])
    assert torch.allclose(pick_targets(logits, SHARD, targets), expected, rtol=0, atol=1e-12)
    assert torch.allclose(best[:, 1], log_probs.amax(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [1, 5, 130, 300, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_of_equal_logits_the_smaller_ids_come_first(count: int, dtype: torch.dtype) -> None:
    logits = make_logits(30).round().to(dtype)  # many ties
    logits[7] = 0.0
    found, ids = largest(logits, SHARD, count)
    for row, values, order in zip(logits.double().numpy(), found.double().numpy(), ids.numpy()):
        real = row[: SHARD.vocab_size]
        expected = np.lexsort((np.arange(SHARD.vocab_size), -real))[:count]
        assert np.array_equal(order, expected)
        assert np.array_equal(values, real[expected])


def test_a_request_has_its_own_uniforms() -> None:
    together = draw_uniforms(5, [3, 8, 1], 20)
    assert torch.equal(draw_uniforms(5, [8], 6)[0], together[1, :6])
    assert len(together.unique()) == 60
    assert not torch.equal(draw_uniforms(6, [8], 20)[0], together[1])
    assert float(together.min()) >= 0 and float(together.max()) < 1
