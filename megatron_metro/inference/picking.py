"""What is picked from logits: the best token, one at random, several candidates, or the probability of a given one.

The logits' vocabulary may be sharded over tensor-parallel ranks; what is picked depends neither on that nor on which
rows stand beside a row. Each pick is a row of float64, which holds ids exactly.
Shape letters: n rows, v the rank's columns of the vocabulary, k candidates.
"""

import torch
from torch import Tensor
from torch.nn import functional

from megatron_metro.parallel import vocab_ops
from megatron_metro.parallel.vocab_ops import VocabShard, VocabStatistics


def pick_best(logits_NV: Tensor, shard: VocabShard) -> Tensor:
    """[n, 2]: the most likely id (the smallest of several) and its log-probability in nats."""
    statistics = vocab_ops.measure(logits_NV, shard)
    return _with_log_probs(statistics.argmax_N, logits_NV, shard, statistics)


def pick_candidates(logits_NV: Tensor, shard: VocabShard, count: int) -> Tensor:
    """[n, 2k]: the ids of the k = min(count, vocabulary) most likely tokens, falling, and their log-probabilities."""
    best_NK, ids_NK = vocab_ops.largest(logits_NV, shard, count)
    statistics = vocab_ops.measure(logits_NV, shard)
    return torch.cat([ids_NK.double(), best_NK.double() - statistics.log_sum_exp_N[:, None]], dim=1)


def pick_targets(logits_NV: Tensor, shard: VocabShard, targets_N: Tensor) -> Tensor:
    """[n, 1]: the log-probability of one given id per row."""
    statistics = vocab_ops.measure(logits_NV, shard, targets_N=targets_N)
    assert statistics.target_logits_N is not None
    return (statistics.target_logits_N.double() - statistics.log_sum_exp_N)[:, None]


def pick_at_random(
    logits_NV: Tensor, shard: VocabShard, uniforms_N: Tensor, *, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """[n, 2]: an id drawn from softmax(logits / temperature), and its log-probability in the model's own distribution.

    Of the `top_k` most likely tokens (0: of all) the draw is among the fewest that together have probability `top_p`.
    `uniforms_N`, float64 in [0, 1), decide; the ids are ordered by probability where some are left out.
    """
    statistics = vocab_ops.measure(logits_NV, shard)
    warm_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature
    if top_k == 0 and top_p == 1.0:
        return _with_log_probs(vocab_ops.sample(warm_NV, uniforms_N, shard), logits_NV, shard, statistics)
    best_NK, ids_NK = vocab_ops.largest(warm_NV, shard, top_k or shard.vocab_size)
    probs_NK = torch.softmax(best_NK.double(), dim=1)
    # A token stays where those before it do not reach top_p; the first one always does.
    is_kept_NK = functional.pad(probs_NK.cumsum(dim=1)[:, :-1], (1, 0)) < top_p
    kept_NK = (probs_NK * is_kept_NK).cumsum(dim=1)
    index_N1 = (kept_NK <= uniforms_N[:, None] * kept_NK[:, -1:]).sum(dim=1, keepdim=True)
    last_N1 = is_kept_NK.sum(dim=1, keepdim=True) - 1  # a product may be rounded up to the total
    ids_N = ids_NK.gather(1, torch.minimum(index_N1, last_N1)).squeeze(1)
    return _with_log_probs(ids_N, logits_NV, shard, statistics)


def _with_log_probs(ids_N: Tensor, logits_NV: Tensor, shard: VocabShard, statistics: VocabStatistics) -> Tensor:
    return torch.stack([ids_N.double(), vocab_ops.log_probabilities(logits_NV, ids_N, shard, statistics)], dim=1)
