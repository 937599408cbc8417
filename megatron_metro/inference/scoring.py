"""Log-probabilities of given targets; all choices of an example are read by the decoder after one pass of the encoder.

Shape letters: b examples, c choices of an example, t tokens of a target, n of all of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_metro.inference.options import WritingIds
from megatron_metro.inference.picking import pick_targets
from megatron_metro.inference.pipeline import EncoderDecoder, Sources


def score_choices(
    model: EncoderDecoder, sources: Sources, choices: Sequence[Sequence[Sequence[int]]], ids: WritingIds
) -> list[list[float]]:
    """The sum of log-probabilities, in nats, of each choice of each example.

    A choice is a target with its end token. Examples may have different numbers of choices: what is missing is padding,
    and so costs as much as what is there.
    """
    most = max(len(targets) for targets in choices)
    rows = [target for targets in choices for target in [*targets, *([[ids.end]] * (most - len(targets)))]]
    longest = max(len(row) for row in rows)
    targets = torch.tensor([[*row, *[ids.pad] * (longest - len(row))] for row in rows], device=model.device)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    start = torch.full_like(targets[:, :1], ids.start)

    def pick(logits_NV: Tensor, positions: slice) -> Tensor:
        return pick_targets(logits_NV, model.shard, targets.flatten()[positions])

    state = model.read(sources)
    log_probs = model.write(state, torch.cat([start, targets[:, :-1]], dim=1), pick, width=1).view_as(targets)
    is_real = torch.arange(longest, device=model.device) < lengths[:, None]
    sums = torch.where(is_real, log_probs, 0.0).sum(dim=1).view(len(choices), most).tolist()
    return [row[: len(targets)] for row, targets in zip(sums, choices)]
