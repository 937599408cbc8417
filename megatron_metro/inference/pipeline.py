"""A model that reads sources once and writes tokens after them, in one process or cut over many.

Of the two simplest ways to decode through pipeline stages, the other was to send hidden states from neighbour to
neighbour and to let the last stage decide alone. Here whoever holds something tells its whole pipeline: a stage its
hidden states, the last one what it picked. All stages wait for one another anyway, since a token needs the token before
it, so this costs nothing and leaves one kind of message. And every rank then knows the candidates and runs the same
selection, so that greedy decoding, sampling and beam search are written once and know nothing of ranks.

Shape letters: b sources, s encoder positions, r rows being written (r / b of each source, side by side), t new
positions, n of them in all rows, h width, v the rank's columns of the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_metro.model.past import WritingState
from megatron_metro.model.writing import WritingPiece
from megatron_metro.parallel.groups import ParallelGroups, broadcast
from megatron_metro.parallel.layout import StageLayout

# What is wanted of logits [n, v], given which of all positions they are of: float64 [n, width], equal on all ranks.
Pick = Callable[[Tensor, slice], Tensor]

_LOGIT_ROWS = 1024  # projected at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """A batch of sources; ids int64."""

    tokens: Tensor  # [b, s]
    padding: Tensor | None  # bool [b, s], True at pad; None where all are equally long


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What was written after a source."""

    ids: tuple[int, ...]  # without start and end token
    score: float  # log-probability in nats, the end token's included; divided by the penalty in beam search
    has_ended: bool  # False where the text was cut at its greatest length


def cut_at_end(tokens_BT: Tensor, scores_B: Tensor, end_id: int) -> list[Written]:
    """Texts up to their end tokens."""
    texts = []
    for row, score in zip(tokens_BT.tolist(), scores_B.tolist()):
        has_ended = end_id in row
        ids = row[: row.index(end_id)] if has_ended else row
        texts.append(Written(ids=tuple(ids), score=score, has_ended=has_ended))
    return texts


def pad_sources(sources: list[list[int]], pad_id: int, device: torch.device) -> Sources:
    """Sources of any lengths side by side."""
    lengths = torch.tensor([len(source) for source in sources])
    longest = int(lengths.max())
    tokens = torch.tensor([source + [pad_id] * (longest - len(source)) for source in sources])
    padding = torch.arange(longest) >= lengths[:, None]
    return Sources(tokens=tokens.to(device), padding=padding.to(device) if padding.any() else None)


class EncoderDecoder:
    """This rank's stage of the main model, and how the stages work together. Every rank makes the same calls."""

    def __init__(self, piece: WritingPiece, layout: StageLayout, groups: ParallelGroups) -> None:
        assert layout.vpp_size == 1 and layout.pp_size == groups.pp_size
        self.piece, self.groups = piece.eval(), groups
        self.shard = piece.context.shard
        self.device = next(piece.parameters()).device
        self._dtype = next(piece.parameters()).dtype
        self._readers, self._writers = (
            [rank for rank, units in enumerate(layout.pieces) if any(unit.network == network for unit in units)]
            for network in ("encoder", "decoder")
        )

    @torch.no_grad()
    def read(self, sources: Sources) -> WritingState:
        """Encode a batch, on all stages."""
        b, s = sources.tokens.shape
        hidden = None
        for stage in self._readers:
            if stage == self.groups.pp_rank:
                hidden = self.piece.read_source(sources.tokens, sources.padding, hidden)
            hidden = self._tell(stage, hidden, (s, b, self.piece.config.hidden_size), self._dtype)
        assert hidden is not None
        return self.piece.start_writing(hidden, sources.padding)

    @torch.no_grad()
    def write(self, state: WritingState, tokens_RT: Tensor, pick: Pick, width: int) -> Tensor:
        """Read the next tokens of all rows (a target's at once, or one each) and pick from the logits after them.

        Returns what `pick` gave for each row and position, [r * t, width], on every rank.
        """
        r, t = tokens_RT.shape
        hidden = None
        for stage in self._writers:
            if stage == self.groups.pp_rank:
                hidden = self.piece.write(tokens_RT, hidden, state)
            if stage != self._writers[-1]:
                hidden = self._tell(stage, hidden, (t, r, self.piece.config.hidden_size), self._dtype)
        picked = None
        if self.groups.pp_rank == self._writers[-1]:
            assert hidden is not None
            rows_NH = hidden.transpose(0, 1).flatten(0, 1)
            blocks = [slice(start, start + _LOGIT_ROWS) for start in range(0, r * t, _LOGIT_ROWS)]
            picked = torch.cat([pick(self.piece.project(rows_NH[block]), block) for block in blocks])
        return self._tell(self._writers[-1], picked, (r * t, width), torch.float64)

    def _tell(self, stage: int, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What one stage holds, on all of them."""
        if stage == self.groups.pp_rank:
            assert tensor is not None and tensor.shape == shape and tensor.dtype == dtype
            tensor = tensor.contiguous()
        else:
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
        return tensor if self.groups.pp_size == 1 else broadcast(tensor, stage, self.groups.pp_group)
