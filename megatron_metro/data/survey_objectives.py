"""The objectives of T5's survey (paper sections 3.3.1 to 3.3.3): a text becomes two sides, </s> at the end of both.

Letters: b blocks, n tokens of a block, s encoder positions, t decoder positions. Each corruption is a pure function of
tokens and of what was drawn, and a builder that draws. The number of noise tokens is T5's rounded share of the text, as
for its spans; which ones they are is drawn without replacement.
"""

from collections.abc import Callable

import numpy as np

from megatron_metro.config.lengths import Lengths, measure_runs
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.spans import count_noise, drop_lengths
from megatron_metro.data.blocks import Blocks
from megatron_metro.data.masking import Ids, Mask, corrupt_tokens
from megatron_metro.data.randomness import Purpose, Words, choose, draw_words, to_integers
from megatron_metro.data.text_to_text import (
    Sides,
    TextToTextObjective,
    append,
    append_end,
    compact,
    full_sides,
    mark_starts,
    require_sentinels,
    weave_masks,
    weave_sentinels,
)
from megatron_metro.tokenizer import Vocabulary


def replace_runs(tokens: Ids, noise: Mask, lengths: Lengths, vocabulary: Vocabulary) -> Sides:
    """Figure 2: a sentinel replaces every run of noise; the target has the runs behind theirs, and a final sentinel."""
    marks, sentinels = mark_starts(noise), vocabulary.span_sentinel_ids
    woven = weave_sentinels(tokens, marks, sentinels)
    inputs, input_lengths = compact(woven, weave_masks(marks, ~noise), lengths.encoder, vocabulary.pad_id)
    targets, target_lengths = compact(woven, weave_masks(marks, noise), lengths.decoder, vocabulary.pad_id)
    input_lengths = append(inputs, input_lengths, vocabulary.eos_id)
    target_lengths = append(targets, target_lengths, np.asarray(sentinels)[marks.sum(axis=1)])
    return Sides(inputs, targets, input_lengths, append(targets, target_lengths, vocabulary.eos_id))


def drop_noise(tokens: Ids, noise: Mask, eos_id: int) -> Sides:
    """The target is what the input lacks; nothing marks the places. Every row has as many noise tokens."""
    sides = (append_end(tokens[part].reshape(len(tokens), -1), eos_id) for part in (~noise, noise))
    return full_sides(*sides)


def mask_noise(tokens: Ids, noise: Mask, shown: Ids, eos_id: int) -> Sides:
    """The input has `shown` at noise tokens; the target is the whole text."""
    return full_sides(append_end(np.where(noise, shown, tokens), eos_id), append_end(tokens, eos_id))


def split_text(tokens: Ids, prefix_lengths: Ids, vocabulary: Vocabulary) -> Sides:
    """The input is the beginning of the text, the target the rest; both are as wide as the text."""
    width = tokens.shape[1]
    is_prefix = np.arange(width) < prefix_lengths[:, None]
    inputs, input_lengths = compact(tokens, is_prefix, width, vocabulary.pad_id)
    targets, target_lengths = compact(tokens, ~is_prefix, width, vocabulary.pad_id)
    ends = (append(*side, vocabulary.eos_id) for side in ((inputs, input_lengths), (targets, target_lengths)))
    return Sides(inputs, targets, *ends)


def shuffle_text(tokens: Ids, order: Ids, eos_id: int) -> Sides:
    """The input is the text in another order, the target the text."""
    return full_sides(append_end(np.take_along_axis(tokens, order, axis=1), eos_id), append_end(tokens, eos_id))


def build_iid(run: RunConfig, vocabulary: Vocabulary, lengths: Lengths) -> TextToTextObjective:
    """`t5-iid`: single tokens are noise, neighbours share a sentinel."""
    raw_length = lengths.encoder - 1
    num_noise = count_noise(raw_length, run.objective.mask_prob)
    num_sentinels = measure_runs(raw_length, num_noise)[0] + 1
    require_sentinels(vocabulary, num_sentinels, f"{num_noise} noise tokens that lie apart and the end of the target")

    def corrupt(blocks: Blocks) -> Sides:
        noise = choose_noise(draw_words(blocks.keys, Purpose.NOISE, raw_length), num_noise)
        return replace_runs(blocks.tokens, noise, lengths, vocabulary)

    return _build(vocabulary, lengths, raw_length, corrupt, is_padded=True)


def build_drop(run: RunConfig, vocabulary: Vocabulary, lengths: Lengths) -> TextToTextObjective:
    """`drop-tokens`: noise tokens are missing in the input."""
    raw_length, num_noise = drop_lengths(lengths.encoder, run.objective.mask_prob)

    def corrupt(blocks: Blocks) -> Sides:
        noise = choose_noise(draw_words(blocks.keys, Purpose.NOISE, raw_length), num_noise)
        return drop_noise(blocks.tokens, noise, vocabulary.eos_id)

    return _build(vocabulary, lengths, raw_length, corrupt)


def build_mass(run: RunConfig, vocabulary: Vocabulary, lengths: Lengths) -> TextToTextObjective:
    """`mass-style`: every noise token is masked."""
    return _build_masked(run, vocabulary, lengths, random_prob=0.0)


def build_bert(run: RunConfig, vocabulary: Vocabulary, lengths: Lengths) -> TextToTextObjective:
    """`bert-style`: a share --mask-random-prob of the noise becomes random tokens, the rest is masked."""
    return _build_masked(run, vocabulary, lengths, random_prob=run.objective.mask_random_prob)


def build_prefix(run: RunConfig, vocabulary: Vocabulary, lengths: Lengths) -> TextToTextObjective:
    """`prefix-lm`: a text is split at a random place, at least one token on either side."""

    def corrupt(blocks: Blocks) -> Sides:
        words = draw_words(blocks.keys, Purpose.SPLIT, 1)[:, 0]
        return split_text(blocks.tokens, 1 + to_integers(words, lengths.encoder - 1), vocabulary)

    return _build(vocabulary, lengths, lengths.encoder, corrupt, is_padded=True)


def build_deshuffle(run: RunConfig, vocabulary: Vocabulary, lengths: Lengths) -> TextToTextObjective:
    """`deshuffle`: the tokens come in random order."""
    raw_length = lengths.encoder - 1

    def corrupt(blocks: Blocks) -> Sides:
        words = draw_words(blocks.keys, Purpose.SHUFFLE, raw_length)
        return shuffle_text(blocks.tokens, np.argsort(words, axis=1, kind="stable"), vocabulary.eos_id)

    return _build(vocabulary, lengths, raw_length, corrupt)


def choose_noise(words: Words, num_noise: int) -> Mask:
    """[b, n]: so many tokens of each text."""
    return choose(words, np.full(len(words), num_noise, dtype=np.int64))


def _build_masked(run: RunConfig, vocabulary: Vocabulary, lengths: Lengths, random_prob: float) -> TextToTextObjective:
    raw_length = lengths.encoder - 1
    num_noise = count_noise(raw_length, run.objective.mask_prob)

    def corrupt(blocks: Blocks) -> Sides:
        words = draw_words(blocks.keys, Purpose.NOISE, 3 * raw_length)
        shown = corrupt_tokens(
            blocks.tokens,
            words=(words[:, raw_length : 2 * raw_length], words[:, 2 * raw_length :]),
            probs=(1 - random_prob, random_prob),
            mask_id=vocabulary.masked_id,
            random_ids=vocabulary.random_ids,
        )
        noise = choose_noise(words[:, :raw_length], num_noise)
        return mask_noise(blocks.tokens, noise, shown, vocabulary.eos_id)

    return _build(vocabulary, lengths, raw_length, corrupt)


def _build(
    vocabulary: Vocabulary,
    lengths: Lengths,
    raw_length: int,
    corrupt: Callable[[Blocks], Sides],
    is_padded: bool = False,
) -> TextToTextObjective:
    return TextToTextObjective(
        vocabulary=vocabulary,
        raw_length=raw_length,
        encoder_length=lengths.encoder,
        decoder_length=lengths.decoder,
        corrupt=corrupt,
        pads_inputs=is_padded,
        pads_targets=is_padded,
    )
