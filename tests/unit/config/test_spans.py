"""Span-corruption arithmetic against the numbers of the T5 library and against a search by brute force."""

import pytest

from megatron_metro.config.errors import ConfigError
from megatron_metro.config.spans import SHORTEST_ENCODER_LENGTH, span_lengths


def test_the_lengths_of_t5():
    assert span_lengths(512, 0.15, 3.0) == (568, 85, 28, 114)


@pytest.mark.parametrize("mask_prob", [0.01, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("mean_span", [1.0, 3.0, 20.0])
def test_the_encoder_is_filled_exactly_by_the_longest_text(mask_prob, mean_span):
    def corrupted_length(raw_length):
        num_noise = min(max(round(raw_length * mask_prob), 1), raw_length - 1)
        return raw_length - num_noise + max(round(num_noise / mean_span), 1) + 1

    for encoder_length in (3, 4, 7, 64, 128, 511):
        lengths = span_lengths(encoder_length, mask_prob, mean_span)
        kept = lengths.raw_length - lengths.num_noise_tokens
        assert kept + lengths.num_spans + 1 == encoder_length == corrupted_length(lengths.raw_length)
        assert corrupted_length(lengths.raw_length + 1) > encoder_length
        assert lengths.decoder_length == lengths.num_noise_tokens + lengths.num_spans + 1
        assert 1 <= lengths.num_spans <= lengths.num_noise_tokens


def test_too_short_an_encoder_is_refused():
    with pytest.raises(ConfigError, match=r"--encoder-seq-length 2 .*at least 3"):
        span_lengths(SHORTEST_ENCODER_LENGTH - 1, 0.15, 3.0)
