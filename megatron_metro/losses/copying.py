"""Copy mechanism (COCO-LM section 3.2): p(x) = p_copy 1[x = input token] + (1 - p_copy) softmax(x), in log space.

p_copy is the sigmoid of a gate's logit. COCO-LM trains its gate by a binary loss alone and keeps the LM loss's gradient
from it; METRO has RTD for that loss, so the LM loss trains the gate.
"""

import torch
from torch import Tensor
from torch.nn import functional


def mix_losses(nll_N: Tensor, gates_N: Tensor, is_input_N: Tensor) -> Tensor:
    """Losses of tokens in nats with copying, from those without it; `is_input_N`: the token is the input's."""
    gates_N = gates_N.to(nll_N.dtype)
    copied_N = functional.logsigmoid(gates_N).masked_fill(~is_input_N, float("-inf"))
    return -torch.logaddexp(functional.logsigmoid(-gates_N) - nll_N, copied_N)


def prefers_input(best_log_prob_N: Tensor, input_log_prob_N: Tensor, gates_N: Tensor) -> Tensor:
    """Whether the input's token is more likely than the best of the vocabulary; both without copying, bool [N]."""
    gates_N = gates_N.to(best_log_prob_N.dtype)
    written = functional.logsigmoid(-gates_N)
    return torch.logaddexp(functional.logsigmoid(gates_N), written + input_log_prob_N) >= written + best_log_prob_N
