"""Copy mechanism (COCO-LM section 3.2): p(x) = p_copy 1[x = input token] + (1 - p_copy) softmax(x), in log space.

p_copy is the probability of "original" in replaced-token detection: COCO-LM's binary task on all tokens is RTD's, and
its LM task on masked ones sends no gradient into it. So 1 - p_copy is the verdict that --weighted-lm-loss weighs with.
"""

import torch
from torch import Tensor


def mix_losses(nll_N: Tensor, replaced_prob_N: Tensor, is_input_N: Tensor) -> Tensor:
    """Losses of tokens in nats with copying, from those without it; `is_input_N`: the token is the input's.

    The verdicts get no gradient.
    """
    written_N, copied_N = _log_shares(replaced_prob_N, nll_N.dtype)
    return -torch.logaddexp(written_N - nll_N, copied_N.masked_fill(~is_input_N, float("-inf")))


def prefers_input(best_log_prob_N: Tensor, input_log_prob_N: Tensor, replaced_prob_N: Tensor) -> Tensor:
    """Whether the input's token is more likely than the best of the vocabulary; both without copying, bool [N]."""
    written_N, copied_N = _log_shares(replaced_prob_N, best_log_prob_N.dtype)
    return torch.logaddexp(copied_N, written_N + input_log_prob_N) >= written_N + best_log_prob_N


def _log_shares(replaced_prob_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(log of 1 - p_copy, log of p_copy); a verdict that has underflown keeps every loss finite."""
    verdicts = replaced_prob_N.detach().to(dtype)
    return verdicts.clamp(min=torch.finfo(torch.float32).tiny).log(), (-verdicts).log1p()
