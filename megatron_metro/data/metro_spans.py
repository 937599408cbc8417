"""The METRO paper's own T5 baseline (reference section 3.5): overlapping spans, and spans without tokens.

Letters: b blocks, s positions, t decoder positions, k span starts.
"""

from dataclasses import dataclass

import numpy as np

from megatron_metro.config.lengths import Lengths
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.spans import EMPTY_SHARE, metro_span_lengths
from megatron_metro.data.blocks import Blocks
from megatron_metro.data.masking import Mask, list_slots
from megatron_metro.data.randomness import Purpose, choose, draw_words, to_uniforms
from megatron_metro.data.text_to_text import (
    Sides,
    TextToTextObjective,
    append,
    compact,
    mark_starts,
    require_sentinels,
    weave_masks,
    weave_sentinels,
)
from megatron_metro.tokenizer import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class MetroSpans:
    """Draws spans: starts anywhere, <s> and </s> included; lengths uniform from 1 to `longest_span`."""

    mask_prob: float
    longest_span: int
    num_starts: int  # the most of a block

    def draw(self, blocks: Blocks) -> tuple[Mask, Mask]:
        """([b, s] noise, [b, s] True at tokens that a span without tokens stands before)."""
        length, longest, num_starts = blocks.tokens.shape[1], self.longest_span, self.num_starts
        num_growths = longest - 1
        words = draw_words(blocks.keys, Purpose.METRO_SPANS, 2 * length + num_growths * num_starts + num_growths + 2)
        uniforms = to_uniforms(words[:, -(num_growths + 2) :])
        inside = np.arange(length) < blocks.lengths[:, None]
        rate = self.mask_prob * (1 - EMPTY_SHARE) / ((1 + longest) / 2)
        counts = np.minimum(np.floor(rate * blocks.lengths + uniforms[:, 0]).astype(np.int64), num_starts)
        starts, growing = list_slots(choose(words[:, :length], counts, inside), num_starts)
        noise = np.zeros((len(blocks), length + 1), dtype=np.bool_)  # the last column is for unused starts
        np.put_along_axis(noise, starts, True, axis=1)
        for grown in range(1, longest):
            # Of the spans as long as `grown` a share grows such that all lengths are equally likely in the end.
            counts = np.floor(counts * ((longest - grown) / (longest - grown + 1)) + uniforms[:, grown]).astype(
                np.int64
            )
            first = 2 * length + (grown - 1) * num_starts
            growing = choose(words[:, first : first + num_starts], counts, growing)
            ends = np.where(growing, (starts + grown) % blocks.lengths[:, None], length)
            np.put_along_axis(noise, ends, True, axis=1)
        noise = noise[:, :length]
        return noise, self._choose_empty(noise, inside, words[:, length : 2 * length], uniforms[:, -1])

    def _choose_empty(self, noise: Mask, inside: Mask, words: np.ndarray, uniforms: np.ndarray) -> Mask:
        """Kept tokens with kept neighbours, as many as the budget lacks noise tokens, up to a cap."""
        candidates = inside & ~noise
        candidates[:, 1:] &= ~noise[:, :-1]
        candidates[:, :-1] &= ~noise[:, 1:]
        lengths = inside.sum(axis=1)
        wanted = np.floor(self.mask_prob * lengths - noise.sum(axis=1) + uniforms).astype(np.int64)
        most = np.floor(self.mask_prob * EMPTY_SHARE * lengths + 1).astype(np.int64)
        counts = np.minimum(np.clip(wanted, 0, most), candidates.sum(axis=1))
        return choose(words, counts, candidates)


def write_sides(blocks: Blocks, noise: Mask, empty: Mask, lengths: Lengths, vocabulary: Vocabulary) -> Sides:
    """The text with sentinels for spans of both kinds, cut at the encoder's length; sentinels, spans, closing token."""
    marks = mark_starts(noise) | empty
    woven = weave_sentinels(blocks.tokens, marks, vocabulary.span_sentinel_ids)
    kept = ~noise & (np.arange(noise.shape[1]) < blocks.lengths[:, None])
    inputs, input_lengths = compact(woven, weave_masks(marks, kept), lengths.encoder, vocabulary.pad_id)
    targets, target_lengths = compact(woven, weave_masks(marks, noise), lengths.decoder, vocabulary.pad_id)
    closing = vocabulary.eos_id if vocabulary.is_t5 else vocabulary.sentinel_ids[0]
    return Sides(inputs, targets, input_lengths, append(targets, target_lengths, closing))


def build_metro_spans(run: RunConfig, vocabulary: Vocabulary, lengths: Lengths) -> TextToTextObjective:
    """`t5-metro`: the decoder writes the spans, or with --lm-targets all the whole text (the paper's control)."""
    objective = run.objective
    bounds = metro_span_lengths(lengths.encoder, objective.mask_prob, objective.mean_noise_span_length)
    require_sentinels(vocabulary, bounds.num_spans, f"up to {bounds.num_spans} spans, empty ones included,")
    spans = MetroSpans(mask_prob=objective.mask_prob, longest_span=bounds.longest_span, num_starts=bounds.num_starts)
    span_targets = Lengths(encoder=lengths.encoder, decoder=bounds.decoder_length, masked=0, targets=0)

    def corrupt(blocks: Blocks) -> Sides:
        if objective.lm_targets == "all":
            sides = write_sides(blocks, *spans.draw(blocks), span_targets, vocabulary)
            return sides._replace(targets=blocks.tokens, target_lengths=blocks.lengths)
        return write_sides(blocks, *spans.draw(blocks), lengths, vocabulary)

    return TextToTextObjective(
        vocabulary=vocabulary,
        raw_length=lengths.encoder,
        encoder_length=lengths.encoder,
        decoder_length=lengths.decoder,
        corrupt=corrupt,
        has_bos=vocabulary.bos_id is not None,
        pads_inputs=True,
        pads_targets=objective.lm_targets != "all" or run.data.block_mode != "full",
    )
