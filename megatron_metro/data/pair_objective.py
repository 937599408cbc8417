"""Fine-tuning: the encoder reads sources and the decoder writes targets, one example a row or several side by side.

Letters: b rows, s encoder positions, t decoder positions.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatron_metro.batch import Microbatch, MicrobatchShape
from megatron_metro.config.lengths import Lengths
from megatron_metro.config.schema import RunConfig
from megatron_metro.data.blocks import Blocks
from megatron_metro.data.text_to_text import Sides, TextToTextObjective
from megatron_metro.tokenizer import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class PairObjective:
    """`text-to-text` on the rows of `pair_rows`. In packed ones every example is read and written as if alone."""

    text: TextToTextObjective
    is_packed: bool

    @property
    def raw_length(self) -> int:
        """Positions of both stretches of a row."""
        return self.text.raw_length

    @property
    def has_bos(self) -> bool:
        """Sources that need <s> have it."""
        return False

    def shape(self, micro_batch_size: int) -> MicrobatchShape:
        """Shape of every microbatch; all decoder positions are target slots."""
        return self.text.shape(micro_batch_size)

    def make_batch(self, blocks: Blocks) -> Microbatch:
        """The microbatch of these rows; row i depends on row i alone."""
        batch = self.text.make_batch(blocks)
        if not self.is_packed:
            return batch
        assert batch.encoder_padding is not None and batch.decoder_padding is not None
        eos_id, start_id = self.text.vocabulary.eos_id, self.text.vocabulary.writing_start_id
        begins_source = _begin_anew(batch.encoder_tokens, batch.encoder_padding, eos_id)
        begins_target = _begin_anew(batch.target_ids, batch.decoder_padding, eos_id)
        return replace(
            batch,
            decoder_tokens=torch.where(begins_target, start_id, batch.decoder_tokens),
            encoder_segments=begins_source.cumsum(dim=1).masked_fill(batch.encoder_padding, -1),
            decoder_segments=begins_target.cumsum(dim=1),
        )


def build_pairs(run: RunConfig, vocabulary: Vocabulary, lengths: Lengths) -> PairObjective:
    """`text-to-text` as a run asks for it."""
    text = TextToTextObjective(
        vocabulary=vocabulary,
        raw_length=lengths.encoder + lengths.decoder,
        encoder_length=lengths.encoder,
        decoder_length=lengths.decoder,
        corrupt=partial(split_row, width=lengths.encoder, pad_id=vocabulary.pad_id),
        start_id=vocabulary.writing_start_id,
        pads_inputs=True,
        pads_targets=True,
    )
    return PairObjective(text=text, is_packed=run.data.pack_examples)


def split_row(blocks: Blocks, width: int, pad_id: int) -> Sides:
    """The two stretches of each row, the encoder's `width` wide; pad stands after the end of a stretch only."""
    inputs, targets = blocks.tokens[:, :width], blocks.tokens[:, width:]
    return Sides(inputs, targets, *((side != pad_id).sum(axis=1) for side in (inputs, targets)))


def _begin_anew(tokens: Tensor, padding: Tensor, eos_id: int) -> Tensor:
    """Bool [b, length]: where an example after the first of its row begins."""
    begins = torch.zeros_like(padding)
    begins[:, 1:] = tokens[:, :-1] == eos_id
    return begins & ~padding
