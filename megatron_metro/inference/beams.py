"""Beam search, with the length penalty and the end of the search as in transformers, or as in T5.

Every step takes the 2n best continuations of the n beams of a source. Those of the best n that end the text are
finished, and compete by log-probability / penalty(length); the best n of the others are the beams of the next step.
A source is closed once n texts are finished and no beam can become better than the worst of them. What that means
is the form's:

- "hf": penalty(length) = length^alpha; a beam is judged at its present length, which is transformers' heuristic.
- "gnmt": penalty(length) = ((5 + length) / 6)^alpha, T5's (section 3.7, from Wu et al., 2016); a beam is judged at the
  length that would do it most good, so that no better text is cut off.

Lengths count the end token and not the start token. Where max_new_tokens are written, all beams are finished.
Shape letters: b sources, n beams, k candidates of a beam or kept continuations of a source, t tokens written at most.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_metro.inference.options import WritingIds, WritingOptions
from megatron_metro.inference.picking import pick_candidates
from megatron_metro.inference.pipeline import EncoderDecoder, Sources, Written, cut_at_end

_NEVER = -1e9  # added to the score of what must not be chosen


@dataclass(frozen=True, slots=True)
class _Texts:
    """Texts of every source, the best first."""

    tokens: Tensor  # int64 [b, n, t]
    scores: Tensor  # float64 [b, n]: log-probabilities of beams, penalised ones of finished texts

    def take(self, order_BK: Tensor) -> "_Texts":
        tokens = self.tokens.gather(1, order_BK[..., None].expand(-1, -1, self.tokens.shape[2]))
        return _Texts(tokens, self.scores.gather(1, order_BK))

    def best(self, count: int) -> "_Texts":
        return self.take(self.scores.sort(dim=1, descending=True, stable=True).indices[:, :count])


def search_beams(model: EncoderDecoder, sources: Sources, ids: WritingIds, options: WritingOptions) -> list[Written]:
    """The best text for each source, its score penalised; a function of the source, whatever stands beside it."""
    b, n, limit = len(sources.tokens), options.num_beams, options.max_new_tokens
    state, device = model.read(sources), model.device
    empty = torch.full((b, n, limit), ids.pad, device=device)
    scores = torch.full((b, n), _NEVER, dtype=torch.float64, device=device)
    beams, finished = _Texts(empty, scores.clone()), _Texts(empty, scores)
    beams.scores[:, 0] = 0.0  # all beams are alike at first, so that one of them counts
    is_open_B = torch.ones(b, dtype=torch.bool, device=device)
    read = torch.full((b * n, 1), ids.start, device=device)
    count = min(2 * n, model.shard.vocab_size)
    for length in range(1, limit + 1):
        picked = model.write(state, read, partial(_pick, model, count), width=2 * count).view(b, n, 2 * count)
        continued, origin_BK = _continue(beams, picked, length)
        ends_BK = (continued.tokens[..., length - 1] == ids.end) | (length == limit)
        finished = _finish(finished, continued, ends_BK, is_open_B, _penalty(options, length))
        beams, kept_BN = _go_on(continued, ends_BK, n)
        is_open_B &= _can_improve(beams, finished, _best_penalty(options, length))
        if not is_open_B.any():
            break
        rows_BN = torch.arange(b, device=device)[:, None] * n + origin_BK.gather(1, kept_BN)
        state.take(rows_BN.flatten())
        read = beams.tokens[..., length - 1].reshape(b * n, 1)
    return cut_at_end(finished.tokens[:, 0], finished.scores[:, 0], ids.end)


def _pick(model: EncoderDecoder, count: int, logits_NV: Tensor, _: slice) -> Tensor:
    return pick_candidates(logits_NV, model.shard, count)


def _continue(beams: _Texts, picked_BN2K: Tensor, length: int) -> tuple[_Texts, Tensor]:
    """The best 2n continuations of each source, and the beam [b, 2n] that each goes on from."""
    ids_BNK, log_probs_BNK = picked_BN2K.chunk(2, dim=2)
    scores = (log_probs_BNK + beams.scores[..., None]).flatten(1)
    best, order = (part[:, : 2 * beams.scores.shape[1]] for part in scores.sort(dim=1, descending=True, stable=True))
    origin = order // ids_BNK.shape[2]
    tokens = beams.take(origin).tokens
    tokens[..., length - 1] = ids_BNK.flatten(1).gather(1, order).long()
    return _Texts(tokens, best), origin


def _finish(finished: _Texts, continued: _Texts, ends_BK: Tensor, is_open_B: Tensor, penalty: float) -> _Texts:
    """The best n texts among those finished before and the ones of the best n continuations that end now."""
    n = finished.scores.shape[1]
    is_new = ends_BK & is_open_B[:, None]
    is_new[:, n:] = False
    scores = torch.where(is_new, continued.scores / penalty, _NEVER)
    together = _Texts(
        torch.cat([finished.tokens, continued.tokens], dim=1), torch.cat([finished.scores, scores], dim=1)
    )
    return together.best(n)


def _go_on(continued: _Texts, ends_BK: Tensor, num_beams: int) -> tuple[_Texts, Tensor]:
    """The best continuations that do not end, and their numbers [b, n] among all."""
    scores = continued.scores + ends_BK * _NEVER
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :num_beams]
    return _Texts(continued.tokens, scores).take(order), order


def _can_improve(beams: _Texts, finished: _Texts, penalty: float) -> Tensor:
    """Bool [b]: fewer than n texts are finished, or the best beam would be better than the worst of them."""
    worst = finished.scores.amin(dim=1)
    return (worst <= _NEVER) | (beams.scores[:, 0] / penalty > worst)


def _penalty(options: WritingOptions, length: int) -> float:
    """What the log-probability of a text of this length is divided by."""
    base = length if options.length_penalty_form == "hf" else (5 + length) / 6
    return float(base**options.length_penalty)


def _best_penalty(options: WritingOptions, length: int) -> float:
    """What a beam of this length is divided by when it is held against finished texts."""
    is_exact = options.length_penalty_form == "gnmt" and options.length_penalty > 0
    return _penalty(options, options.max_new_tokens if is_exact else length)
