"""Lengths of T5's span corruption: pure arithmetic, no tokens."""

import math
from bisect import bisect_right
from typing import NamedTuple

from megatron_metro.config.errors import ConfigError

SHORTEST_ENCODER_LENGTH = 3  # one token kept, one sentinel, </s>


class SpanLengths(NamedTuple):
    """How many tokens of text fill the encoder exactly, and what that makes of the decoder."""

    raw_length: int  # tokens of text before corruption
    num_noise_tokens: int
    num_spans: int
    decoder_length: int  # noise tokens, one sentinel per span and </s>


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

    def count_noise(raw_length: int) -> tuple[int, int]:
        num_noise_tokens = min(max(round(raw_length * mask_prob), 1), raw_length - 1)
        return num_noise_tokens, max(round(num_noise_tokens / mean_span), 1)

    def corrupted_length(raw_length: int) -> int:
        num_noise_tokens, num_spans = count_noise(raw_length)
        return raw_length - num_noise_tokens + num_spans + 1

    # One more token of text lengthens the corrupted form by 0 or 1, so the encoder is always filled exactly.
    candidates = range(2, math.ceil(encoder_length / (1 - mask_prob)) + 3)
    raw_length = candidates[bisect_right(candidates, encoder_length, key=corrupted_length) - 1]
    num_noise_tokens, num_spans = count_noise(raw_length)
    return SpanLengths(raw_length, num_noise_tokens, num_spans, num_noise_tokens + num_spans + 1)
