"""T5's span corruption: blocks of tokens to two sides, and the objective `t5-span`.

</s> ends both sides; the library's arithmetic leaves no padding and no final sentinel. With T5's vocabulary sentinels
count down from the last id and pad starts the decoder. With METRO's they count up: the i-th span (from 1) is <sen00i>,
and <sen000> starts the decoder. Letters: b blocks, n tokens of a block, s encoder positions, t decoder positions.
"""

import numpy as np

from megatron_metro.config.errors import ConfigError
from megatron_metro.config.lengths import Lengths
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.spans import SpanLengths, span_lengths
from megatron_metro.data.blocks import Blocks
from megatron_metro.data.masking import Ids, Mask, mark_spans, split_randomly
from megatron_metro.data.randomness import BlockKeys, Purpose, draw_words
from megatron_metro.data.text_to_text import TextToTextObjective, full_sides, require_sentinels
from megatron_metro.tokenizer import Vocabulary


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


def build_spans(run: RunConfig, vocabulary: Vocabulary, lengths: Lengths) -> TextToTextObjective:
    """`t5-span` as a run asks for it."""
    objective = run.objective
    spans = span_lengths(lengths.encoder, objective.mask_prob, objective.mean_noise_span_length)
    return build_span_objective(spans, lengths.encoder, vocabulary)


def build_span_objective(lengths: SpanLengths, encoder_length: int, vocabulary: Vocabulary) -> TextToTextObjective:
    """Span corruption with a vocabulary's sentinels; ConfigError when spans do not fit or sentinels do not suffice."""
    check_spans(lengths, vocabulary)
    return TextToTextObjective(
        vocabulary=vocabulary,
        raw_length=lengths.raw_length,
        encoder_length=encoder_length,
        decoder_length=lengths.decoder_length,
        corrupt=lambda blocks: full_sides(*corrupt_spans(blocks, lengths, vocabulary)),
    )


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
