"""The same logits cut over 1, 2 and 4 ranks give the same losses and gradients, and bit for bit the same tokens."""

import pytest
import torch
import torch.distributed as dist

from megatron_metro.parallel.vocab_ops import VocabShard, argmax, cross_entropy, largest, measure, sample

NUM_ROWS = 64
EXCLUDED = (1, 700)


def make_case(vocab_size: int, padded_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (padded columns huge, some ties, some impossible tokens), targets and uniforms."""
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(NUM_ROWS, padded_size, generator=generator, dtype=torch.float64) * 4
    logits[5] = 0.0
    logits[6, 40:] = -1e30
    logits[7, : vocab_size - 1] = -1e30
    logits[8, [3, 300, vocab_size - 1]] = 50.0
    logits[:, vocab_size:] = 1e4
    targets = torch.randint(vocab_size, (NUM_ROWS,), generator=generator)
    targets[6], targets[7] = 5, vocab_size - 1
    uniforms = torch.rand(NUM_ROWS, generator=generator, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2.0**-53])
    return logits.to(dtype), targets, uniforms


def compute(shard: VocabShard, dtype: torch.dtype) -> list[torch.Tensor]:
    """Losses, this rank's columns of the gradient, sampled ids (two ways), argmax (two ways) and the largest."""
    logits, targets, uniforms = make_case(shard.vocab_size, shard.padded_size, dtype)
    local = logits[:, shard.first : shard.first + shard.num_columns].clone().requires_grad_()
    statistics = measure(local, shard, targets_N=targets, excluded_ids=EXCLUDED)
    losses = cross_entropy(local, targets, shard, statistics)
    (losses * uniforms.to(losses.dtype)).sum().backward()
    assert torch.equal(losses, cross_entropy(local, targets, shard))
    ids = sample(local, uniforms, shard, EXCLUDED, statistics)
    assert torch.equal(ids, sample(local, uniforms, shard, EXCLUDED))
    best = argmax(local, shard)
    assert torch.equal(best, statistics.argmax_N)
    return [losses.detach(), local.grad, ids, best, *largest(local, shard, 9), *largest(local, shard, 700)]


def compute_on_worker(cases: list[tuple[int, int]], dtypes: list[torch.dtype]) -> list[list[torch.Tensor]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    shards = [VocabShard(vocab_size=v, padded_size=p, rank=rank, size=size, group=dist.group.WORLD) for v, p in cases]
    return [compute(shard, dtype) for shard in shards for dtype in dtypes]


@pytest.mark.parametrize("size", [2, 4])
def test_every_number_of_ranks_agrees_with_one(size, pool):
    # Whole chunks; padding inside a rank; ranks that hold nothing but padding.
    cases, dtypes = [(1024, 1024), (1000, 1024), (1001, 2048)], [torch.float64, torch.float32, torch.bfloat16]
    answers = pool(size).run(compute_on_worker, cases, dtypes)
    for i, (case, dtype) in enumerate([(c, d) for c in cases for d in dtypes]):
        losses, gradient, ids, best, *ordered = compute(VocabShard(vocab_size=case[0], padded_size=case[1]), dtype)
        for answer in answers:
            assert torch.equal(answer[i][0], losses)
            assert torch.equal(answer[i][2], ids)
            assert torch.equal(answer[i][3], best)
            assert all(torch.equal(a, b) for a, b in zip(answer[i][4:], ordered, strict=True))
        joined = torch.cat([answer[i][1] for answer in answers], dim=1)
        tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
        assert torch.allclose(joined.double(), gradient.double(), rtol=0, atol=tolerance)
        assert joined.isfinite().all()
        assert not joined[:, case[0] :].any()
