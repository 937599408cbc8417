"""T5's span corruption: blocks of tokens to microbatches.

Letters: b blocks, n tokens of a block, s encoder positions, t decoder positions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_metro.batch import Microbatch, MicrobatchShape
from megatron_metro.config.errors import ConfigError
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.spans import SpanLengths, span_lengths
from megatron_metro.data.blocks import Blocks, map_rows
from megatron_metro.data.masking import Ids, Mask, mark_spans, split_randomly
from megatron_metro.data.randomness import BlockKeys, Purpose, draw_words
from megatron_metro.data.text_to_text import every_slot, require_sentinels, shift_right
from megatron_metro.tokenizer import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanObjective:
    """T5's span corruption with the library's arithmetic: </s> ends both sides, no final sentinel.

    With T5's vocabulary sentinels count down from the last id and pad starts the decoder. With METRO's they count up:
    the i-th span (from 1) is <sen00i>, and <sen000> starts the decoder.
    """

    vocabulary: Vocabulary
    lengths: SpanLengths
    encoder_length: int

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
        slots, valid = every_slot(targets)
        return Microbatch(
            encoder_tokens=encoder_tokens,
            decoder_tokens=decoder_tokens,
            target_slots=slots,
            target_ids=targets,
            target_valid=valid,
        )

    def _make_rows(self, blocks: Blocks) -> tuple[NDArray, ...]:
        encoder_tokens, targets = corrupt_spans(blocks, self.lengths, self.vocabulary)
        return encoder_tokens, shift_right(targets, self.vocabulary.decoder_start_id), targets


def corrupt_spans(blocks: Blocks, lengths: SpanLengths, vocabulary: Vocabulary) -> tuple[Ids, Ids]:
    """([b, s] text with a sentinel for each span and </s>, [b, t] each sentinel, its span, and </s>)."""
    return replace_spans(blocks.tokens, *draw_spans(blocks.keys, lengths), vocabulary)


def draw_spans(keys: BlockKeys, lengths: SpanLengths) -> tuple[Mask, Mask, Ids]:
    """([b, n] noise, [b, n] span starts, [b, spans] span lengths) of T5's random spans."""
    num_noise, num_spans = lengths.num_noise_tokens, lengths.num_spans
    num_kept = lengths.raw_length - num_noise
    words = draw_words(keys, Purpose.SPANS, num_kept - 1 + num_noise - 1)
    noise_lengths = split_randomly(words[:, num_kept - 1 :], num_noise, num_spans)
    kept_lengths = split_randomly(words[:, : num_kept - 1], num_kept, num_spans)
    return *mark_spans(kept_lengths, noise_lengths), noise_lengths


def replace_spans(
    tokens: Ids, noise: Mask, is_start: Mask, noise_lengths: Ids, vocabulary: Vocabulary
) -> tuple[Ids, Ids]:
    """The two sides of texts that have as many noise tokens and spans each."""
    num_rows, num_spans = noise_lengths.shape
    num_noise = int(noise_lengths[0].sum())
    sentinels = np.asarray(vocabulary.span_sentinel_ids[:num_spans])

    num_left = tokens.shape[1] - num_noise + num_spans
    encoder_tokens = np.full((num_rows, num_left + 1), vocabulary.eos_id, dtype=np.int64)
    with_sentinels = tokens.copy()
    with_sentinels[is_start] = np.tile(sentinels, num_rows)
    encoder_tokens[:, :-1] = with_sentinels[~noise | is_start].reshape(num_rows, -1)

    targets = np.full((num_rows, num_noise + num_spans + 1), vocabulary.eos_id, dtype=np.int64)
    is_sentinel = np.zeros((num_rows, num_noise + num_spans), dtype=np.bool_)
    # Before the i-th sentinel stand i sentinels and the noise of i spans.
    sentinel_slots = noise_lengths.cumsum(axis=1) - noise_lengths + np.arange(num_spans)
    np.put_along_axis(is_sentinel, sentinel_slots, True, axis=1)
    spans = targets[:, :-1]
    spans[is_sentinel] = np.tile(sentinels, num_rows)
    spans[~is_sentinel] = tokens[noise]
    return encoder_tokens, targets


def build_spans(run: RunConfig, vocabulary: Vocabulary) -> SpanObjective:
    """`t5-span` as a run asks for it."""
    length, objective = run.data.encoder_seq_length, run.objective
    lengths = span_lengths(length, objective.mask_prob, objective.mean_noise_span_length)
    return build_span_objective(lengths, length, vocabulary)


def build_span_objective(lengths: SpanLengths, encoder_length: int, vocabulary: Vocabulary) -> SpanObjective:
    """Span corruption with a vocabulary's sentinels; ConfigError when spans do not fit or sentinels do not suffice."""
    check_spans(lengths, vocabulary)
    return SpanObjective(vocabulary=vocabulary, lengths=lengths, encoder_length=encoder_length)


def check_spans(lengths: SpanLengths, vocabulary: Vocabulary, num_masks: int = 0) -> None:
    """ConfigError unless tokens between spans and sentinels suffice; `num_masks` sentinels have another use."""
    num_kept = lengths.raw_length - lengths.num_noise_tokens
    if lengths.num_spans > num_kept:
        raise ConfigError(
            f"--mask-prob leaves {num_kept} tokens between {lengths.num_spans} spans; lower it or raise "
            "--mean-noise-span-length"
        )
    use = f"{lengths.num_spans} spans{' and the mask token' if num_masks else ''}"
    require_sentinels(vocabulary, lengths.num_spans + num_masks, use)
