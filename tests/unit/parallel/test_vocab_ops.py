"""Cross-entropy, sampling and argmax on a vocabulary held by one rank, against torch's and plain formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_metro.parallel.vocab_ops import (
    CHUNK_SIZE,
    VocabShard,
    argmax,
    cross_entropy,
    log_probabilities,
    measure,
    sample,
)

WHOLE = VocabShard(vocab_size=512, padded_size=512)
PADDED = VocabShard(vocab_size=300, padded_size=640)


def make_logits(shard: VocabShard, num_rows: int = 37, scale: float = 3.0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(num_rows, shard.padded_size, generator=generator, dtype=torch.float64) * scale
    logits[:, shard.vocab_size :] = 1e4  # padded columns must never count, whatever they hold
    return logits.to(dtype)


def make_targets(shard: VocabShard, num_rows: int = 37) -> torch.Tensor:
    return torch.randint(shard.vocab_size, (num_rows,), generator=torch.Generator().manual_seed(6))


def sample_plainly(logits: torch.Tensor, uniforms: torch.Tensor, excluded_ids: tuple[int, ...] = ()) -> torch.Tensor:
    """Softmax, one cumulative sum, first id above the uniform; all in float64."""
    logits = logits.double().clone()
    logits[:, list(excluded_ids)] = -math.inf
    cumulative = torch.softmax(logits, dim=1).cumsum(dim=1)
    return (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(dim=1)


@pytest.mark.parametrize("shard", [WHOLE, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)], ids=str
)
def test_cross_entropy_and_its_gradient_equal_torch(shard, dtype, tolerance):
    logits, targets = make_logits(shard, dtype=dtype).requires_grad_(), make_targets(shard)
    before = logits.detach().clone()
    weights = torch.rand(37, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    losses = cross_entropy(logits, targets, shard)
    (losses * weights.to(losses.dtype)).sum().backward()

    expected_logits = before.double().requires_grad_()
    expected = F.cross_entropy(expected_logits[:, : shard.vocab_size], targets, reduction="none")
    (expected * weights).sum().backward()
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(losses.double(), expected, rtol=0, atol=min(tolerance * 10, 1e-5))
    assert logits.grad.dtype == dtype
    assert torch.allclose(logits.grad.double(), expected_logits.grad, rtol=0, atol=tolerance)
    assert torch.equal(logits.detach(), before), "the input was overwritten"
    assert not logits.grad[:, shard.vocab_size :].any()


@pytest.mark.parametrize("shard", [WHOLE, PADDED], ids=["whole", "padded"])
def test_log_probabilities_of_single_ids(shard):
    logits, ids = make_logits(shard).requires_grad_(), make_targets(shard)
    found = log_probabilities(logits, ids, shard, measure(logits, shard))
    expected = torch.log_softmax(logits[:, : shard.vocab_size], dim=1).gather(1, ids[:, None]).squeeze(1)
    assert torch.allclose(found, expected, rtol=0, atol=1e-13)
    assert not found.requires_grad


def test_gradient_passes_gradcheck():
    shard = VocabShard(vocab_size=130, padded_size=256)
    logits = make_logits(shard, num_rows=3, scale=1.0).requires_grad_()
    targets = torch.tensor([0, 129, 64])
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets, shard), logits, fast_mode=True)


def test_bf16_gradient_is_the_rounded_fp32_gradient():
    logits, targets = make_logits(WHOLE, dtype=torch.bfloat16), make_targets(WHOLE)
    low, high = logits.clone().requires_grad_(), logits.float().requires_grad_()
    cross_entropy(low, targets, WHOLE).sum().backward()
    cross_entropy(high, targets, WHOLE).sum().backward()
    assert torch.equal(low.grad, high.grad.bfloat16())


def test_no_rows_and_many_blocks_of_rows():
    empty = torch.zeros(0, 512, requires_grad=True)
    cross_entropy(empty, torch.zeros(0, dtype=torch.long), WHOLE).sum().backward()
    assert empty.grad.shape == (0, 512)
    assert sample(empty, torch.zeros(0, dtype=torch.float64), WHOLE).shape == (0,)
    many = make_logits(WHOLE, num_rows=2500, dtype=torch.float32).requires_grad_()  # more than one block
    targets = make_targets(WHOLE, num_rows=2500)
    losses = cross_entropy(many, targets, WHOLE)
    losses.sum().backward()
    twin = many.detach().clone().requires_grad_()
    expected = F.cross_entropy(twin, targets, reduction="none")
    expected.sum().backward()
    assert torch.allclose(losses, expected, atol=1e-5)
    assert torch.allclose(many.grad, twin.grad, atol=1e-6)


def test_very_peaked_and_impossible_logits_give_finite_losses():
    logits = torch.full((3, 512), -math.inf)
    logits[0, 7] = 0.0  # one possible token
    logits[1] = -1e4
    logits[1, 500] = 1e4  # one overwhelming token
    logits[2, :2] = torch.tensor([80.0, -80.0])
    losses = cross_entropy(logits, torch.tensor([7, 500, 1]), WHOLE)
    assert torch.equal(losses, torch.tensor([0.0, 0.0, 160.0]))


@pytest.mark.parametrize("shard", [WHOLE, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("excluded_ids", [(), (1,), (1, 130, 299)], ids=str)
def test_samples_equal_a_plain_inverse_cdf(shard, excluded_ids):
    logits = make_logits(shard, num_rows=400)
    uniforms = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    expected = sample_plainly(logits[:, : shard.vocab_size], uniforms, excluded_ids)
    assert torch.equal(sample(logits, uniforms, shard, excluded_ids), expected)
    statistics = measure(logits, shard, excluded_ids=excluded_ids)
    assert torch.equal(sample(logits, uniforms, shard, excluded_ids, statistics), expected)


def test_sampled_frequencies_follow_the_probabilities():
    shard = VocabShard(vocab_size=260, padded_size=384)
    logits = make_logits(shard, num_rows=1, scale=1.0, dtype=torch.float32).expand(20_000, -1)
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    counts = torch.bincount(sample(logits, uniforms, shard, (1,)), minlength=260)
    expected = logits[0, :260].double().clone()
    expected[1] = -math.inf
    # Evenly spaced uniforms hit each interval within one of its expected count.
    assert (counts - torch.softmax(expected, dim=0) * 20_000).abs().max() <= 1.01
    assert counts[1] == 0


def test_edges_of_the_uniform():
    equal = torch.zeros(4, 300 + 340)
    uniforms = torch.tensor([0.0, math.nextafter(1.0, 0.0), 0.5, 127.5 / 299], dtype=torch.float64)
    assert sample(equal, uniforms, PADDED, (0,)).tolist() == [1, 299, 150, 128]
    assert sample(equal, uniforms, PADDED, (299,)).tolist() == [0, 298, 149, 127]


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.3, math.nextafter(1.0, 0.0)])
def test_impossible_tokens_are_never_drawn(uniform):
    logits = torch.full((5, 512), -math.inf)
    logits[0, 3] = 0.0
    logits[1, [200, 511]] = torch.tensor([-700.0, -700.0])
    logits[2] = 0.0
    logits[2, 1] = 1e30  # an excluded id that outweighs everything
    logits[3, [1, 2]] = torch.tensor([1000.0, -1000.0])
    logits[4, [1, 400]] = torch.tensor([5.0, -90.0])  # its whole chunk is excluded
    ids = sample(logits, torch.full((5,), uniform, dtype=torch.float64), WHOLE, (1,)).tolist()
    assert ids[0] == 3 and ids[1] == (511 if uniform > 0.5 else 200)
    assert ids[2] != 1 and ids[3] == 2 and ids[4] == 400


def test_sampling_does_not_change_the_loss():
    logits, targets = make_logits(PADDED), make_targets(PADDED)
    targets[0] = 1
    with_exclusion = measure(logits, PADDED, targets_N=targets, excluded_ids=(1,))
    assert torch.equal(cross_entropy(logits, targets, PADDED, with_exclusion), cross_entropy(logits, targets, PADDED))


def test_argmax_prefers_the_smallest_id():
    logits = torch.zeros(4, 640)
    logits[:, 300:] = 9.0  # padding
    logits[1, [5, 127, 128, 299]] = 1.0
    logits[2, [129, 298]] = 1.0
    logits[3] = -math.inf
    logits[3, 299] = -5.0
    assert argmax(logits, PADDED).tolist() == [0, 5, 129, 299]
    assert measure(logits, PADDED).argmax_N.tolist() == [0, 5, 129, 299]
    random = make_logits(WHOLE)
    assert torch.equal(argmax(random, WHOLE), random.argmax(dim=1))


def test_chunk_sums_do_not_depend_on_the_rows_and_columns_beside_them():
    logits = make_logits(WHOLE, num_rows=50, dtype=torch.float32)
    whole = measure(logits, WHOLE).sampling_sum_NC
    first = VocabShard(vocab_size=256, padded_size=256)
    assert torch.equal(measure(logits[:, :256].contiguous(), first).sampling_sum_NC, whole[:, :2])
    assert torch.equal(measure(logits[:1], WHOLE).sampling_sum_NC, whole[:1])


def test_bad_shards_are_refused():
    with pytest.raises(ValueError, match="make-vocab-size-divisible-by"):
        VocabShard(vocab_size=300, padded_size=300)
    with pytest.raises(ValueError, match="make-vocab-size-divisible-by"):
        VocabShard(vocab_size=300, padded_size=CHUNK_SIZE * 2)
    with pytest.raises(ValueError, match="process group"):
        VocabShard(vocab_size=256, padded_size=256, size=2)
