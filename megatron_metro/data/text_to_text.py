"""Text-to-text objectives: what they have in common once a text has become two sides.

Letters: b blocks, n tokens of a block, s encoder positions, t decoder positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_metro.batch import Microbatch, MicrobatchShape
from megatron_metro.config.errors import ConfigError
from megatron_metro.data.blocks import Blocks, map_rows
from megatron_metro.data.masking import Ids, Mask
from megatron_metro.tokenizer import Vocabulary


class Sides(NamedTuple):
    """What the encoder reads and what the decoder writes, pad after the end of a side."""

    inputs: Ids  # [b, s]
    targets: Ids  # [b, t]
    input_lengths: Ids  # [b]
    target_lengths: Ids  # [b]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextToTextObjective:
    """Any corruption of a text into an input and a target; all positions of the target are trained."""

    vocabulary: Vocabulary
    raw_length: int
    encoder_length: int
    decoder_length: int
    corrupt: Callable[[Blocks], Sides]
    start_id: int | None = None  # what the decoder reads first, where it is not as in pretraining
    has_bos: bool = False
    pads_inputs: bool = False  # sides may end early
    pads_targets: bool = False

    def shape(self, micro_batch_size: int) -> MicrobatchShape:
        """Shape of every microbatch; all decoder positions are target slots."""
        return MicrobatchShape(
            micro_batch_size=micro_batch_size,
            encoder_length=self.encoder_length,
            decoder_length=self.decoder_length,
            num_masked_slots=0,
            num_target_slots=self.decoder_length,
        )

    def make_batch(self, blocks: Blocks) -> Microbatch:
        """The microbatch of these blocks; row i depends on row i alone."""
        inputs, targets, input_lengths, target_lengths, decoder_tokens = map_rows(blocks, self._make_rows)
        slots, valid = every_slot(targets)
        padding = None
        if self.pads_targets:
            valid = slots < target_lengths[:, None]
            slots, padding = torch.where(valid, slots, self.decoder_length), ~valid
        return Microbatch(
            encoder_tokens=inputs,
            decoder_tokens=decoder_tokens,
            target_slots=slots,
            target_ids=targets,
            target_valid=valid,
            encoder_padding=torch.arange(self.encoder_length) >= input_lengths[:, None] if self.pads_inputs else None,
            decoder_padding=padding,
        )

    def _make_rows(self, blocks: Blocks) -> tuple[NDArray, ...]:
        sides = self.corrupt(blocks)
        start_id = self.vocabulary.decoder_start_id if self.start_id is None else self.start_id
        decoder_tokens = shift_right(sides.targets, start_id)
        if self.pads_targets:
            decoder_tokens[np.arange(self.decoder_length) >= sides.target_lengths[:, None]] = self.vocabulary.pad_id
        return (*sides, decoder_tokens)


def full_sides(inputs: Ids, targets: Ids) -> Sides:
    """Sides without padding."""
    lengths = (np.full(len(side), side.shape[1], dtype=np.int64) for side in (inputs, targets))
    return Sides(inputs, targets, *lengths)


def shift_right(targets: Ids, start_id: int) -> Ids:
    """[b, t] what the decoder reads: the start token, then the targets without their last."""
    shifted = np.empty_like(targets)
    shifted[:, 0] = start_id
    shifted[:, 1:] = targets[:, :-1]
    return shifted


def every_slot(targets: Tensor) -> tuple[Tensor, Tensor]:
    """(slots, validity) [b, t] of an objective that trains every position."""
    slots = torch.arange(targets.shape[1]).expand(targets.shape).contiguous()
    return slots, torch.ones_like(slots, dtype=torch.bool)


def compact(ids: Ids, kept: Mask, width: int, pad_id: int) -> tuple[Ids, Ids]:
    """([b, width], [b] lengths): the kept entries of every row moved to its front, cut at `width`."""
    lengths = np.minimum(kept.sum(axis=1), width)
    rows = np.full((len(ids), width), pad_id, dtype=np.int64)
    rows[np.arange(width) < lengths[:, None]] = ids[kept & (kept.cumsum(axis=1) <= width)]
    return rows, lengths


def append(rows: Ids, lengths: Ids, token_ids: Ids | int) -> Ids:
    """The lengths after one more token behind each row; `rows` is written to and has room for it."""
    rows[np.arange(len(rows)), lengths] = token_ids
    return lengths + 1


def append_end(tokens: Ids, eos_id: int) -> Ids:
    """[b, n + 1]: whole texts and </s>."""
    return np.pad(tokens, ((0, 0), (0, 1)), constant_values=eos_id)


def weave_sentinels(tokens: Ids, marks: Mask, sentinel_ids: Sequence[int]) -> Ids:
    """[b, 2 n]: before each token the sentinel it would be marked with, the i-th mark of a row being sentinel i."""
    woven = np.empty((len(tokens), tokens.shape[1], 2), dtype=np.int64)
    woven[..., 0] = np.asarray(sentinel_ids)[np.maximum(marks.cumsum(axis=1) - 1, 0)]
    woven[..., 1] = tokens
    return woven.reshape(len(tokens), -1)


def weave_masks(marks: Mask, kept: Mask) -> Mask:
    """[b, 2 n]: which places of `weave_sentinels` are kept: sentinels at marks, tokens where `kept`."""
    return np.stack([marks, kept], axis=2).reshape(len(marks), -1)


def mark_starts(noise: Mask) -> Mask:
    """[b, n]: True where a run of noise begins."""
    starts = noise.copy()
    starts[:, 1:] &= ~noise[:, :-1]
    return starts


def require_sentinels(vocabulary: Vocabulary, num_spans: int, use: str) -> None:
    """ConfigError unless the vocabulary has a sentinel for each span; `use` says what the spans are of."""
    most = len(vocabulary.span_sentinel_ids)
    if num_spans > most:
        raise ConfigError(
            f"--vocab-extra-ids is {vocabulary.num_sentinels}; {use} need {num_spans + vocabulary.num_sentinels - most}"
        )
