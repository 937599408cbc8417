"""Operations on logits whose vocabulary is sharded over tensor-parallel ranks: cross-entropy, sampling, the largest.

All of them read the same few numbers per row, the maximum and the sum of exponentials of every 128-wide chunk of the
vocabulary. `measure` gets these in one pass over the logits and one all-gather; the chunks lie on a grid that does not
depend on the number of ranks, so what is sampled does not depend on it either (design: parallelism never changes the
result). Columns of the padding above `vocab_size` are never read.

Shape letters: N rows, V columns of this rank, C chunks, K columns of a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_metro.config.errors import ConfigError

CHUNK_SIZE = 128
_MINUS_INFINITY = float("-inf")
# Elements handled at once, so that temporaries stay in a CPU's cache and stay small beside the logits on a GPU.
_BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabShard:
    """Which columns of the vocabulary this rank holds: columns [first, first + num_columns), real below vocab_size."""

    vocab_size: int
    padded_size: int
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None  # None where there is one rank

    def __post_init__(self) -> None:
        if self.padded_size % (self.size * CHUNK_SIZE) or not 0 < self.vocab_size <= self.padded_size:
            raise ConfigError(
                f"padded vocabulary size {self.padded_size} must be a multiple of {CHUNK_SIZE} x {self.size} ranks and "
                f"at least the vocabulary size {self.vocab_size}; change --make-vocab-size-divisible-by"
            )
        if (self.group is None) != (self.size == 1):
            raise ValueError(f"a vocabulary over {self.size} rank(s): give a process group only if there are several")

    @property
    def num_columns(self) -> int:
        return self.padded_size // self.size

    @property
    def first(self) -> int:
        return self.rank * self.num_columns

    @property
    def num_real_columns(self) -> int:
        """Columns of this rank below `vocab_size`."""
        return min(max(self.vocab_size - self.first, 0), self.num_columns)

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole unpadded vocabulary: the same for every number of ranks."""
        return -(-self.vocab_size // CHUNK_SIZE)

    @property
    def chunks_per_rank(self) -> int:
        return self.num_columns // CHUNK_SIZE


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabStatistics:
    """What one pass over the logits found; equal on all ranks except `local_log_sum_exp_N`. Detached."""

    log_sum_exp_N: Tensor  # float64
    local_log_sum_exp_N: Tensor  # float64, over this rank's columns
    argmax_N: Tensor  # int64, the smallest id where logits tie
    target_logits_N: Tensor | None  # in the dtype of the computation; None when measured without targets
    sampling_max_NC: Tensor  # largest logit of each chunk, excluded ids left out
    sampling_sum_NC: Tensor  # sum of exp(logit - sampling_max) over each chunk, excluded ids left out
    excluded_ids: tuple[int, ...]


def measure(
    logits_NV: Tensor, shard: VocabShard, *, targets_N: Tensor | None = None, excluded_ids: tuple[int, ...] = ()
) -> VocabStatistics:
    """One pass over the logits and one all-gather: all that loss, sampling without `excluded_ids` and argmax need.

    Computes in FP32, or FP64 for FP64 logits. The logits of a row must not be all -inf, nor contain NaN or +inf.
    """
    logits_NV = logits_NV.detach()
    max_NC, sum_NC = _measure_chunks(logits_NV, shard)
    parts = [max_NC, sum_NC, *_best_token(logits_NV, max_NC, shard)]
    excluded_chunks = sorted({i // CHUNK_SIZE for i in excluded_ids})
    for chunk in excluded_chunks:
        parts += _measure_without(logits_NV, chunk, shard, excluded_ids)
    if targets_N is not None:
        parts.append(_logits_at(logits_NV, targets_N, shard))
    gathered = _all_gather(parts, shard)

    global_max_NC, global_sum_NC = (_join_ranks(part_RNC, shard.num_chunks) for part_RNC in gathered[:2])
    best_RN, best_id_RN = gathered[2].squeeze(2), gathered[3].squeeze(2)
    log_sum_exp_N = _log_sum_exp(global_max_NC, global_sum_NC)
    for i, chunk in enumerate(excluded_chunks):
        owner = chunk // shard.chunks_per_rank
        global_max_NC[:, chunk] = gathered[4 + 2 * i][owner, :, 0]
        global_sum_NC[:, chunk] = gathered[5 + 2 * i][owner, :, 0]
    return VocabStatistics(
        log_sum_exp_N=log_sum_exp_N,
        local_log_sum_exp_N=log_sum_exp_N if shard.size == 1 else _log_sum_exp(max_NC, sum_NC),
        argmax_N=_pick(best_id_RN, best_RN.argmax(dim=0)).long(),
        target_logits_N=None if targets_N is None else _pick(gathered[-1].squeeze(2), targets_N // shard.num_columns),
        sampling_max_NC=global_max_NC,
        sampling_sum_NC=global_sum_NC,
        excluded_ids=excluded_ids,
    )


def cross_entropy(
    logits_NV: Tensor, targets_N: Tensor, shard: VocabShard, statistics: VocabStatistics | None = None
) -> Tensor:
    """Cross-entropy of each row in nats: FP32 [N], or FP64 for FP64 logits, equal on all ranks.

    The logits (BF16, FP16, FP32 or FP64) are not overwritten; their gradient, softmax - onehot computed in FP32 or
    FP64, has their dtype and is zero in padded columns. `statistics` must come from `measure` with these targets.
    """
    if statistics is None:
        statistics = measure(logits_NV, shard, targets_N=targets_N)
    assert statistics.target_logits_N is not None, "statistics were measured without targets"
    losses_N = (statistics.log_sum_exp_N - statistics.target_logits_N).to(_compute_dtype(logits_NV))
    local_share_N = torch.exp(statistics.local_log_sum_exp_N - statistics.log_sum_exp_N).to(losses_N.dtype)
    losses: Tensor = _CrossEntropy.apply(logits_NV, targets_N, losses_N, local_share_N, shard)
    return losses


def sample(
    logits_NV: Tensor,
    uniforms_N: Tensor,
    shard: VocabShard,
    excluded_ids: tuple[int, ...] = (),
    statistics: VocabStatistics | None = None,
) -> Tensor:
    """Draw one id per row from softmax(logits) without `excluded_ids`, by inverse CDF: int64 [N], equal on all ranks.

    `uniforms_N` is float64 in [0, 1), one per row. The id is the first whose cumulative probability, in the order of
    the ids, exceeds the uniform; equal for every number of ranks. One int all-reduce besides `measure`, which is not
    run again where its `statistics` are given.
    """
    if statistics is None:
        statistics = measure(logits_NV, shard, excluded_ids=excluded_ids)
    assert statistics.excluded_ids == excluded_ids, "statistics were measured for other excluded ids"
    max_NC, sum_NC = statistics.sampling_max_NC.double(), statistics.sampling_sum_NC.double()
    weights_NC = torch.exp(max_NC - max_NC.amax(dim=1, keepdim=True)) * sum_NC
    chunk_N, remainder_N = _invert_cdf(weights_NC, uniforms_N)

    local_chunk_N = chunk_N - shard.rank * shard.chunks_per_rank
    is_local_N = (local_chunk_N >= 0) & (local_chunk_N < shard.chunks_per_rank)
    local_chunk_N = local_chunk_N.clamp(0, shard.chunks_per_rank - 1)
    is_excluded_NK = _is_excluded(shard, excluded_ids, logits_NV.device)[local_chunk_N]
    logits_NK = _chunk_logits(logits_NV.detach(), local_chunk_N).masked_fill(is_excluded_NK, _MINUS_INFINITY)
    weights_NK = torch.exp(logits_NK - _finite(logits_NK.amax(dim=1, keepdim=True))).double()
    token_N, _ = _invert_cdf(weights_NK, remainder_N)
    ids_N = torch.where(is_local_N, chunk_N * CHUNK_SIZE + token_N, -1)
    if shard.group is not None:
        dist.all_reduce(ids_N, dist.ReduceOp.MAX, group=shard.group)
    return ids_N


def log_probabilities(logits_NV: Tensor, ids_N: Tensor, shard: VocabShard, statistics: VocabStatistics) -> Tensor:
    """Log-probability of one id per row, without a graph: float64 [N], equal on all ranks. One small all-gather."""
    (gathered_RN1,) = _all_gather([_logits_at(logits_NV.detach(), ids_N, shard)], shard)
    return _pick(gathered_RN1.squeeze(2), ids_N // shard.num_columns) - statistics.log_sum_exp_N


def argmax(logits_NV: Tensor, shard: VocabShard) -> Tensor:
    """The id of each row's largest logit, the smallest one where logits tie: int64 [N], equal on all ranks."""
    logits_NV = logits_NV.detach()
    chunk_max_NC = _padded_chunks(_chunk_maxima(logits_NV, shard), shard, _MINUS_INFINITY)
    best_RN1, best_id_RN1 = _all_gather(_best_token(logits_NV, chunk_max_NC, shard), shard)
    return _pick(best_id_RN1.squeeze(2), best_RN1.squeeze(2).argmax(dim=0)).long()


def largest(logits_NV: Tensor, shard: VocabShard, count: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row in falling order, and their ids: [N, count] each, equal on all ranks.

    Where logits tie, the smaller id comes first. FP32, or FP64 for FP64 logits; fewer than `count` columns where the
    vocabulary is smaller. One all-gather.
    """
    logits_NV = logits_NV.detach()
    max_NC = _padded_chunks(_chunk_maxima(logits_NV, shard), shard, _MINUS_INFINITY)
    # As many tokens come before any token outside of the first `count` chunks, in order of their maxima, as are wanted.
    chunks = max_NC.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
    within_K = torch.arange(CHUNK_SIZE, device=logits_NV.device)
    ids_NI = (chunks[..., None] * CHUNK_SIZE + within_K).flatten(1)
    values_NI = logits_NV.gather(1, ids_NI).to(_compute_dtype(logits_NV))
    values_NI = values_NI.masked_fill(ids_NI >= shard.num_real_columns, _MINUS_INFINITY)
    best, order = (part[:, :count] for part in values_NI.sort(dim=1, descending=True, stable=True))
    ids = (ids_NI.gather(1, order) + shard.first).to(best.dtype)  # exact: ids are below 2^24
    gathered, gathered_ids = (part.transpose(0, 1).flatten(1) for part in _all_gather([best, ids], shard))
    count = min(count, shard.vocab_size)
    best, order = (part[:, :count] for part in gathered.sort(dim=1, descending=True, stable=True))
    return best, gathered_ids.gather(1, order).long()


class _CrossEntropy(torch.autograd.Function):
    """Forward: hand out the losses found before. Backward: softmax - onehot from the saved logits, no collective."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, losses_N: Tensor, local_share_N: Tensor, shard: VocabShard
    ) -> Tensor:
        ctx.save_for_backward(logits_NV, targets_N, local_share_N)
        ctx.shard = shard
        return losses_N.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_NV, targets_N, local_share_N = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        grad_N1 = grad_outputs[0][:, None]
        # softmax over this rank's columns x the rank's share of the row = softmax over all columns.
        scale_N1 = grad_N1 * local_share_N[:, None]
        real = shard.num_real_columns
        result_NV = torch.empty_like(logits_NV)
        result_NV[:, real:] = 0
        if real == 0:
            return result_NV, None, None, None, None
        target_N1 = (targets_N - shard.first)[:, None]
        is_local_N1 = (target_N1 >= 0) & (target_N1 < real)
        target_N1 = target_N1.clamp(0, real - 1)
        for rows in _row_blocks(logits_NV):
            softmax = torch.softmax(logits_NV[rows, :real], dim=1, dtype=grad_N1.dtype)
            at_target = softmax.gather(1, target_N1[rows]) * scale_N1[rows] - grad_N1[rows] * is_local_N1[rows]
            result = torch.mul(softmax, scale_N1[rows], out=result_NV[rows, :real])
            result.scatter_(1, target_N1[rows], at_target.to(result.dtype))
        return result_NV, None, None, None, None


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _row_blocks(logits_NV: Tensor) -> list[slice]:
    rows = max(1, _BLOCK_ELEMENTS[logits_NV.device.type] // logits_NV.shape[1])
    return [slice(start, start + rows) for start in range(0, max(logits_NV.shape[0], 1), rows)]


def _finite(maximum: Tensor) -> Tensor:
    """A maximum that can be subtracted: that of an empty set, -inf, becomes 0."""
    return maximum.masked_fill(maximum == _MINUS_INFINITY, 0)


def _whole_chunks_and_tail(logits_NV: Tensor, shard: VocabShard) -> list[Tensor]:
    """This rank's real columns as [N, c, 128]: the whole chunks (a view) and the incomplete last one, -inf-filled."""
    whole, rest = divmod(shard.num_real_columns, CHUNK_SIZE)
    parts = [logits_NV[:, : whole * CHUNK_SIZE].unflatten(1, (whole, CHUNK_SIZE))] if whole else []
    if rest:
        tail_NK = logits_NV.new_full((logits_NV.shape[0], CHUNK_SIZE), _MINUS_INFINITY)
        tail_NK[:, :rest] = logits_NV[:, whole * CHUNK_SIZE : shard.num_real_columns]
        parts.append(tail_NK[:, None])
    return parts


def _padded_chunks(values: list[Tensor], shard: VocabShard, fill: float) -> Tensor:
    """Per-chunk values of the real columns, extended to all chunks of this rank: [N, chunks_per_rank]."""
    rows = values[0]
    missing = shard.chunks_per_rank - sum(v.shape[1] for v in values)
    return torch.cat([*values, rows.new_full((rows.shape[0], missing), fill)], dim=1)


def _chunk_maxima(logits_NV: Tensor, shard: VocabShard) -> list[Tensor]:
    dtype = _compute_dtype(logits_NV)
    parts = _whole_chunks_and_tail(logits_NV, shard)
    return [p.amax(dim=2).to(dtype) for p in parts] or [logits_NV.new_empty((logits_NV.shape[0], 0), dtype=dtype)]


def _exp_sum(chunks_NCK: Tensor, maxima_NC: Tensor) -> Tensor:
    """Sum of exp(x - max) of each chunk.

    It is 1 / softmax at the maximum: one fused kernel whose rows of 128 are added in an order that depends on nothing
    else, where a plain sum's order may change with the number of rows and columns.
    """
    sums_NC = torch.softmax(chunks_NCK, dim=2, dtype=maxima_NC.dtype).amax(dim=2).reciprocal()
    return sums_NC.masked_fill_(maxima_NC == _MINUS_INFINITY, 0)


def _measure_chunks(logits_NV: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Maximum and sum of exp(logit - maximum) of this rank's chunks, [N, chunks_per_rank] each."""
    maxima, sums = [], []
    for rows in _row_blocks(logits_NV):
        block_maxima = _chunk_maxima(logits_NV[rows], shard)
        parts = _whole_chunks_and_tail(logits_NV[rows], shard)
        block_sums = [_exp_sum(p, m) for p, m in zip(parts, block_maxima, strict=False)] or block_maxima
        maxima.append(_padded_chunks(block_maxima, shard, _MINUS_INFINITY))
        sums.append(_padded_chunks(block_sums, shard, 0.0))
    return torch.cat(maxima), torch.cat(sums)


def _log_sum_exp(max_NC: Tensor, sum_NC: Tensor) -> Tensor:
    row_max_N1 = _finite(max_NC.amax(dim=1, keepdim=True).double())
    return (torch.exp(max_NC.double() - row_max_N1) * sum_NC).sum(dim=1).log() + row_max_N1.squeeze(1)


def _chunk_logits(logits_NV: Tensor, local_chunk_N: Tensor) -> Tensor:
    """The 128 logits of one chunk of this rank per row, in the dtype of the computation: [N, 128]."""
    chunks_NCK = logits_NV.unflatten(1, (-1, CHUNK_SIZE))
    rows_N = torch.arange(logits_NV.shape[0], device=logits_NV.device)
    return chunks_NCK[rows_N, local_chunk_N].to(_compute_dtype(logits_NV))


def _is_excluded(shard: VocabShard, excluded_ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Which columns of this rank must not be sampled, as [chunks_per_rank, 128]."""
    ids_V = torch.arange(shard.first, shard.first + shard.num_columns, device=device)
    excluded_V = ids_V >= shard.vocab_size
    for i in excluded_ids:
        excluded_V |= ids_V == i
    return excluded_V.unflatten(0, (-1, CHUNK_SIZE))


def _best_token(logits_NV: Tensor, chunk_max_NC: Tensor, shard: VocabShard) -> list[Tensor]:
    """Largest logit of this rank's real columns and its id, as [N, 1] each in the dtype of the computation (exact)."""
    best_N, chunk_N = chunk_max_NC.max(dim=1)
    # The maximum is known, so padded columns that equal it can be told apart: they come last.
    token_N = (_chunk_logits(logits_NV, chunk_N) == best_N[:, None]).int().argmax(dim=1)
    ids_N = shard.first + chunk_N * CHUNK_SIZE + token_N
    return [best_N[:, None], ids_N[:, None].to(best_N.dtype)]


def _measure_without(
    logits_NV: Tensor, chunk: int, shard: VocabShard, excluded_ids: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Maximum and exponential sum of one chunk without the excluded ids, [N, 1] each; only its owner's are used."""
    local_chunk = min(max(chunk - shard.rank * shard.chunks_per_rank, 0), shard.chunks_per_rank - 1)
    columns = slice(local_chunk * CHUNK_SIZE, (local_chunk + 1) * CHUNK_SIZE)
    is_excluded_K = _is_excluded(shard, excluded_ids, logits_NV.device)[local_chunk]
    kept_NK = logits_NV[:, columns].masked_fill(is_excluded_K, _MINUS_INFINITY)
    max_N1 = kept_NK.amax(dim=1, keepdim=True).to(_compute_dtype(logits_NV))
    return max_N1, _exp_sum(kept_NK[:, None], max_N1)


def _logits_at(logits_NV: Tensor, ids_N: Tensor, shard: VocabShard) -> Tensor:
    """The logits of these ids, [N, 1] in the dtype of the computation; arbitrary where another rank holds the id."""
    local_N1 = (ids_N - shard.first).clamp(0, shard.num_columns - 1)[:, None]
    return logits_NV.gather(1, local_N1).to(_compute_dtype(logits_NV))


def _all_gather(parts: list[Tensor], shard: VocabShard) -> list[Tensor]:
    """Forward: each [N, P] part of all ranks as [ranks, N, P], in one collective. No backward."""
    if shard.group is None:
        return [part[None] for part in parts]
    packed_NP = torch.cat(parts, dim=1)
    gathered_RNP = packed_NP.new_empty((shard.size, *packed_NP.shape))
    dist.all_gather(list(gathered_RNP.unbind(0)), packed_NP, group=shard.group)
    return list(gathered_RNP.split([part.shape[1] for part in parts], dim=2))


def _join_ranks(values_RNC: Tensor, num_chunks: int) -> Tensor:
    """The chunks of all ranks side by side, without those of the padding: a copy, [N, num_chunks]."""
    return values_RNC.transpose(0, 1).flatten(1)[:, :num_chunks].clone()


def _pick(values_RN: Tensor, rank_N: Tensor) -> Tensor:
    return values_RN.gather(0, rank_N[None]).squeeze(0)


def _invert_cdf(weights_NK: Tensor, uniforms_N: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose cumulative weight exceeds uniform x total, and where in its interval that falls, in [0, 1)."""
    cumulative_NK = weights_NK.cumsum(dim=1)
    total_N = cumulative_NK[:, -1]
    # A product rounded up to the total would select nothing; just below it selects the last positive weight.
    below_total_N = torch.nextafter(total_N, torch.zeros_like(total_N))
    target_N1 = torch.minimum(uniforms_N * total_N, below_total_N)[:, None]
    index_N1 = torch.searchsorted(cumulative_NK, target_N1, right=True).clamp(max=weights_NK.shape[1] - 1)
    upper_N1 = cumulative_NK.gather(1, index_N1)
    lower_N1 = torch.where(index_N1 > 0, cumulative_NK.gather(1, (index_N1 - 1).clamp(min=0)), 0.0)
    return index_N1.squeeze(1), ((target_N1 - lower_N1) / (upper_N1 - lower_N1)).squeeze(1)
