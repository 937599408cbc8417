"""T5's span corruption: blocks of tokens to microbatches. Letters: b blocks, s positions, t decoder positions."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_metro.batch import Microbatch, MicrobatchShape
from megatron_metro.config.errors import ConfigError
from megatron_metro.config.spans import SpanLengths
from megatron_metro.data.blocks import Blocks, map_rows
from megatron_metro.data.masking import mark_spans, split_randomly
from megatron_metro.data.randomness import Purpose, draw_words
from megatron_metro.tokenizer import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanObjective:
    """T5's span corruption with the library's arithmetic: </s> ends both sides, no final sentinel.

    With METRO's vocabulary sentinels count up: the i-th span (from 1) is <sen00i>, and <sen000> starts the decoder.
    """

    vocabulary: Vocabulary
    lengths: SpanLengths
    encoder_length: int
    decoder_start_id: int
    first_sentinel_id: int

    @property
    def raw_length(self) -> int:
        """Tokens of a block before corruption."""
        return self.lengths.raw_length

    @property
    def has_bos(self) -> bool:
        """T5 has no <s>."""
        return False

    def shape(self, micro_batch_size: int) -> MicrobatchShape:
        """Shape of every microbatch; all decoder positions are targets."""
        return MicrobatchShape(
            micro_batch_size=micro_batch_size,
            encoder_length=self.encoder_length,
            decoder_length=self.lengths.decoder_length,
            num_masked_slots=0,
            num_target_slots=self.lengths.decoder_length,
        )

    def make_batch(self, blocks: Blocks) -> Microbatch:
        """The microbatch of these blocks; row i depends on row i alone."""
        encoder_tokens, decoder_tokens, targets = map_rows(blocks, self._make_rows)
        slots = torch.arange(targets.shape[1]).expand(targets.shape).contiguous()
        return Microbatch(
            encoder_tokens=encoder_tokens,
            decoder_tokens=decoder_tokens,
            target_slots=slots,
            target_ids=targets,
            target_valid=torch.ones_like(slots, dtype=torch.bool),
        )

    def _make_rows(self, blocks: Blocks) -> tuple[NDArray, ...]:
        num_rows, num_noise, num_spans = len(blocks), self.lengths.num_noise_tokens, self.lengths.num_spans
        num_kept = self.lengths.raw_length - num_noise
        words = draw_words(blocks.keys, Purpose.SPANS, num_kept - 1 + num_noise - 1)
        noise_lengths = split_randomly(words[:, num_kept - 1 :], num_noise, num_spans)
        noise, is_start = mark_spans(split_randomly(words[:, : num_kept - 1], num_kept, num_spans), noise_lengths)
        sentinels = self.first_sentinel_id + np.arange(num_spans)

        encoder_tokens = np.full((num_rows, self.encoder_length), self.vocabulary.eos_id, dtype=np.int64)
        with_sentinels = blocks.tokens.copy()
        with_sentinels[is_start] = np.tile(sentinels, num_rows)
        encoder_tokens[:, :-1] = with_sentinels[~noise | is_start].reshape(num_rows, -1)

        targets = np.full((num_rows, self.lengths.decoder_length), self.vocabulary.eos_id, dtype=np.int64)
        is_sentinel = np.zeros((num_rows, num_noise + num_spans), dtype=np.bool_)
        # Before the i-th sentinel stand i sentinels and the noise of i spans.
        sentinel_slots = noise_lengths.cumsum(axis=1) - noise_lengths + np.arange(num_spans)
        np.put_along_axis(is_sentinel, sentinel_slots, True, axis=1)
        spans = targets[:, :-1]
        spans[is_sentinel] = np.tile(sentinels, num_rows)
        spans[~is_sentinel] = blocks.tokens[noise]

        decoder_tokens = np.empty_like(targets)
        decoder_tokens[:, 0] = self.decoder_start_id
        decoder_tokens[:, 1:] = targets[:, :-1]
        return encoder_tokens, decoder_tokens, targets


def build_span_objective(lengths: SpanLengths, encoder_length: int, vocabulary: Vocabulary) -> SpanObjective:
    """Span corruption with METRO's sentinels."""
    num_kept = lengths.raw_length - lengths.num_noise_tokens
    if lengths.num_spans > num_kept:
        raise ConfigError(
            f"--mask-prob leaves {num_kept} tokens between {lengths.num_spans} spans; lower it or raise "
            "--mean-noise-span-length"
        )
    if lengths.num_spans >= vocabulary.num_sentinels:
        raise ConfigError(
            f"--vocab-extra-ids is {vocabulary.num_sentinels}; {lengths.num_spans} spans and the decoder start need "
            f"{lengths.num_spans + 1}"
        )
    return SpanObjective(
        vocabulary=vocabulary,
        lengths=lengths,
        encoder_length=encoder_length,
        decoder_start_id=vocabulary.sentinel_ids[0],
        first_sentinel_id=vocabulary.sentinel_ids[1],
    )
