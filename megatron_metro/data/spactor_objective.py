"""SPACTOR: T5's span corruption, and masks on what it leaves. Letters: b blocks, s positions, t decoder positions."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_metro.batch import Microbatch, MicrobatchShape
from megatron_metro.config.lengths import Lengths
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.spans import SpanLengths, span_lengths
from megatron_metro.data.blocks import Blocks, map_rows
from megatron_metro.data.masking import draw_uniforms, list_slots, round_counts, take_slots
from megatron_metro.data.randomness import Purpose, choose, draw_words, to_uniforms
from megatron_metro.data.span_objective import build_spans, check_spans, corrupt_spans
from megatron_metro.data.text_to_text import TextToTextObjective, every_slot, shift_right
from megatron_metro.tokenizer import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class SpactorObjective:
    """The encoder reads span-corrupted text in which a generator filled masked tokens; the decoder writes the spans.

    Masks fall on ordinary tokens only, neither on sentinels nor on </s>, wherever it stands; all of them show the mask
    token. The spans are those of `t5-span` on the same blocks.
    """

    vocabulary: Vocabulary
    lengths: SpanLengths
    encoder_length: int
    num_slots: int  # static; suffices for the largest masking rate of a schedule
    mask_prob: float  # of the tokens that span corruption leaves
    rounds_at_random: bool  # the number of masked tokens; down when False

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
            num_masked_slots=self.num_slots,
            num_target_slots=self.lengths.decoder_length,
        )

    def make_batch(self, blocks: Blocks) -> Microbatch:
        """The microbatch of these blocks; row i depends on row i alone."""
        tokens, decoder_tokens, targets, generator_tokens, slots, ids, valid, uniforms = map_rows(
            blocks, self._make_rows
        )
        target_slots, target_valid = every_slot(targets)
        return Microbatch(
            encoder_tokens=tokens,
            decoder_tokens=decoder_tokens,
            target_slots=target_slots,
            target_ids=targets,
            target_valid=target_valid,
            generator_tokens=generator_tokens,
            masked_slots=slots,
            masked_ids=ids,
            masked_valid=valid,
            uniforms=uniforms,
        )

    def _make_rows(self, blocks: Blocks) -> tuple[NDArray, ...]:
        vocabulary, length = self.vocabulary, self.encoder_length
        tokens, targets = corrupt_spans(blocks, self.lengths, vocabulary)
        candidates = (tokens < vocabulary.num_pieces) & (tokens != vocabulary.eos_id)
        words = draw_words(blocks.keys, Purpose.MASK, length + 1)
        uniforms = to_uniforms(words[:, -1]) * self.rounds_at_random
        counts = round_counts(candidates.sum(axis=1), self.mask_prob, uniforms)
        chosen = choose(words[:, :length], np.minimum(counts, candidates.sum(axis=1)), candidates)
        slots, valid = list_slots(chosen, self.num_slots)
        return (
            tokens,
            shift_right(targets, vocabulary.decoder_start_id),
            targets,
            np.where(chosen, vocabulary.masked_id, tokens),
            slots,
            np.where(valid, take_slots(tokens, slots), vocabulary.pad_id),
            valid,
            draw_uniforms(blocks.keys, length, slots, valid),
        )


def build_spactor(run: RunConfig, vocabulary: Vocabulary, lengths: Lengths) -> SpactorObjective | TextToTextObjective:
    """`spactor` as a run asks for it: without a generator span corruption alone, as after its stage switch."""
    if not run.model.has_generator:
        return build_spans(run, vocabulary, lengths)
    objective = run.objective
    spans = span_lengths(lengths.encoder, objective.mask_prob, objective.mean_noise_span_length)
    # METRO's mask token marks no span anyway; T5's is a sentinel like others.
    check_spans(spans, vocabulary, num_masks=int(vocabulary.is_t5))
    return SpactorObjective(
        vocabulary=vocabulary,
        lengths=spans,
        encoder_length=lengths.encoder,
        num_slots=int(lengths.masked),
        mask_prob=objective.spactor_mask_prob,
        rounds_at_random=objective.probabilistic_rounding,
    )
