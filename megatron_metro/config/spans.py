"""Lengths of corrupted text: pure arithmetic, no tokens."""

import math
from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

from megatron_metro.config.errors import ConfigError

SHORTEST_ENCODER_LENGTH = 3  # one token kept, one sentinel, </s>
EMPTY_SHARE = 0.1  # of the budget of METRO's T5 sampler: what spans without tokens may replace


class SpanLengths(NamedTuple):
    """How many tokens of text fill the encoder exactly, and what that makes of the decoder."""

    raw_length: int  # tokens of text before corruption
    num_noise_tokens: int
    num_spans: int
    decoder_length: int  # noise tokens, one sentinel per span and </s>


class MetroSpanLengths(NamedTuple):
    """The most that the METRO paper's T5 sampler draws from one block, and what it draws on average."""

    longest_span: int  # nominal lengths are uniform from 1 to this
    num_starts: int
    num_spans: int  # sentinels of both kinds of span
    decoder_length: int  # suffices for any draw: noise tokens, sentinels of both kinds of span, closing token
    mean_target_length: float


def count_noise(raw_length: int, mask_prob: float) -> int:
    """T5's number of noise tokens in a text: rounded, at least one, at least one token kept."""
    return min(max(round(raw_length * mask_prob), 1), raw_length - 1)


def span_lengths(encoder_length: int, mask_prob: float, mean_span: float) -> SpanLengths:
    """The T5 library's arithmetic: the longest text whose corrupted form, </s> included, has `encoder_length` tokens.

    512 tokens at 0.15 and mean span 3 take 568 tokens of text: 85 noise tokens in 28 spans, 114 decoder tokens.
    The library's special case for mask_prob 0.5 is left out.
    """
    if encoder_length < SHORTEST_ENCODER_LENGTH:
        raise ConfigError(
            f"--encoder-seq-length {encoder_length} leaves no room for a token, a sentinel and </s>; "
            f"give at least {SHORTEST_ENCODER_LENGTH}"
        )

    def corrupted_length(raw_length: int) -> int:
        num_noise_tokens = count_noise(raw_length, mask_prob)
        return raw_length - num_noise_tokens + _count_spans(num_noise_tokens, mean_span) + 1

    raw_length = _longest_text(encoder_length, mask_prob, corrupted_length)
    num_noise_tokens = count_noise(raw_length, mask_prob)
    num_spans = _count_spans(num_noise_tokens, mean_span)
    return SpanLengths(raw_length, num_noise_tokens, num_spans, num_noise_tokens + num_spans + 1)


def drop_lengths(encoder_length: int, mask_prob: float) -> tuple[int, int]:
    """(tokens of text, of which dropped) that leave `encoder_length` tokens, </s> included."""
    raw_length = _longest_text(encoder_length, mask_prob, lambda length: length - count_noise(length, mask_prob) + 1)
    return raw_length, count_noise(raw_length, mask_prob)


def metro_span_lengths(length: int, mask_prob: float, mean_span: float) -> MetroSpanLengths:
    """Bounds and means of the METRO paper's T5 sampler (reference section 3.5) on blocks of `length` tokens.

    The mean takes starts as independent of each other and ignores that empty spans are capped per block: it is within
    1 % of what is drawn.
    """
    longest = max(round(2 * mean_span - 1), 1)
    starts = expect_metro_starts(length, mask_prob, longest)
    growing = most = math.ceil(starts)
    for grown in range(1, longest):
        growing = math.ceil(growing * (longest - grown) / (longest - grown + 1))
        most += growing
    most_noise = min(most, length)
    # Empty spans fill the budget up, so noise and empty spans together stay within the larger of the two.
    budget = math.ceil(mask_prob * length)
    most_targets = max(most_noise, min(budget, most_noise + most_empty_spans(length, mask_prob)))
    # A span that runs over the end of the block goes on at its beginning, where it is one more.
    most_runs = min(math.ceil(starts) + 1, length)
    decoder_length = most_targets + most_runs + 1

    density = starts / length
    kept = math.prod(1 - density * (longest - grown) / longest for grown in range(longest))
    noise = length * (1 - kept)
    empty = min(max(mask_prob * length - noise, 0.0), most_empty_spans(length, mask_prob))
    return MetroSpanLengths(
        longest_span=longest,
        num_starts=math.ceil(starts),
        num_spans=most_runs + most_empty_spans(length, mask_prob),
        decoder_length=decoder_length,
        mean_target_length=noise + starts * kept + empty + 1,
    )


def expect_metro_starts(length: int, mask_prob: float, longest_span: int) -> float:
    """Mean number of span starts; what is left of the budget is for spans without tokens."""
    return mask_prob * (1 - EMPTY_SHARE) * length / ((1 + longest_span) / 2)


def most_empty_spans(length: int, mask_prob: float) -> int:
    """The most spans without tokens that the METRO paper's T5 sampler adds to a block."""
    return int(mask_prob * EMPTY_SHARE * length + 1)


def _count_spans(num_noise_tokens: int, mean_span: float) -> int:
    return max(round(num_noise_tokens / mean_span), 1)


def _longest_text(encoder_length: int, mask_prob: float, corrupted_length: Callable[[int], int]) -> int:
    """The most tokens whose corrupted form fits; one more token of text lengthens it by 0 or 1, so it fits exactly."""
    candidates = range(2, math.ceil(encoder_length / (1 - mask_prob)) + 3)
    return candidates[bisect_right(candidates, encoder_length, key=corrupted_length) - 1]
