"""Sequence lengths and slot counts that follow from a run's objective: what fixes every static shape and FLOP count."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_metro.config.curriculum import largest_values
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.spans import count_noise, drop_lengths, metro_span_lengths, span_lengths

SLOT_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Positions of one sequence. Slot counts are whole where shapes are meant, means where FLOPs are."""

    encoder: int
    decoder: int  # 0: the objective needs no decoder
    masked: float  # slots the generator fills and its head projects
    targets: float  # slots the LM head projects


class Measures(NamedTuple):
    """What the loader delivers, whose slots suffice for the largest count a block can draw, and the means of it."""

    static: Lengths
    mean: Lengths


def static_lengths(config: RunConfig) -> Lengths:
    """Lengths of what the loader delivers, whose slots suffice for the largest count a block can draw."""
    largest = replace(config, objective=largest_values(config.objective))
    return MEASURES[config.objective.objective](largest).static


def mean_lengths(config: RunConfig) -> Lengths:
    """Lengths with the mean numbers of masked and target tokens of a full block, for FLOPs."""
    return MEASURES[config.objective.objective](config).mean


def count_slots(sequence_length: int, mask_prob: float) -> int:
    """A static number of slots that always suffices for a count of floor(mask_prob x length + U), U in [0, 1)."""
    return round_up(int(mask_prob * sequence_length + 1))


def round_up(length: int) -> int:
    """The next multiple of 8, which tensor-parallel ranks can share."""
    return -(-length // SLOT_MULTIPLE) * SLOT_MULTIPLE


def measure_runs(raw_length: int, num_noise_tokens: int) -> tuple[int, float]:
    """(most, mean) runs of noise when that many tokens of a text are drawn without replacement."""
    num_kept = raw_length - num_noise_tokens
    return min(num_noise_tokens, num_kept + 1), num_noise_tokens * (num_kept + 1) / raw_length


def _measure_metro(config: RunConfig) -> Measures:
    """The decoder writes the whole text or the masked tokens alone."""
    length, is_short = config.data.encoder_seq_length, config.objective.lm_targets == "masked-only"
    num_slots = count_slots(length, config.objective.mask_prob)
    return _measure_masking(config, num_slots if is_short else length)


def _measure_electra(config: RunConfig) -> Measures:
    return _measure_masking(config, 0)


def _measure_masking(config: RunConfig, decoder_length: int) -> Measures:
    objective, length = config.objective, config.data.encoder_seq_length
    num_slots, mean = _measure_masks(config, length, objective.mask_prob)
    every = objective.lm_targets == "all"
    measured = (
        Lengths(
            encoder=length,
            decoder=decoder_length,
            masked=count if config.model.has_generator else 0,
            targets=length if every else count,
        )
        for count in (num_slots, mean)
    )
    return Measures(*measured)


def _measure_masks(config: RunConfig, num_tokens: int, mask_prob: float) -> tuple[int, float]:
    """(slots, mean count) of tokens masked one by one."""
    mean = mask_prob * num_tokens
    return count_slots(num_tokens, mask_prob), mean if config.objective.probabilistic_rounding else float(int(mean))


def _measure_spactor(config: RunConfig) -> Measures:
    spans = _measure_spans(config).static
    raw = span_lengths(spans.encoder, config.objective.mask_prob, config.objective.mean_noise_span_length)
    counts = _measure_masks(config, raw.raw_length - raw.num_noise_tokens, config.objective.spactor_mask_prob)
    if not config.model.has_generator:
        counts = 0, 0
    measured = (
        Lengths(encoder=spans.encoder, decoder=spans.decoder, masked=count, targets=spans.targets) for count in counts
    )
    return Measures(*measured)


def _measure_spans(config: RunConfig) -> Measures:
    objective, length = config.objective, config.data.encoder_seq_length
    spans = span_lengths(length, objective.mask_prob, objective.mean_noise_span_length)
    return _measure_text(length, spans.decoder_length, spans.decoder_length)


def _measure_metro_spans(config: RunConfig) -> Measures:
    objective, length = config.objective, config.data.encoder_seq_length
    if objective.lm_targets == "all":
        return _measure_text(length, length, length)
    spans = metro_span_lengths(length, objective.mask_prob, objective.mean_noise_span_length)
    return _measure_text(length, round_up(spans.decoder_length), spans.mean_target_length)


def _measure_iid(config: RunConfig) -> Measures:
    """The encoder has room for a text whose noise tokens all lie apart; the decoder closes with a sentinel and </s>."""
    length = config.data.encoder_seq_length
    num_noise_tokens = count_noise(length - 1, config.objective.mask_prob)
    most_runs, mean_runs = measure_runs(length - 1, num_noise_tokens)
    return _measure_text(length, round_up(num_noise_tokens + most_runs + 2), num_noise_tokens + mean_runs + 2)


def _measure_prefix(config: RunConfig) -> Measures:
    """A text as long as the encoder is split anywhere, so one side's </s> fits where the other's tokens are missing."""
    length = config.data.encoder_seq_length
    return _measure_text(length, length, length / 2 + 1)


def _measure_restored(config: RunConfig) -> Measures:
    """Both sides hold the whole text and </s>."""
    length = config.data.encoder_seq_length
    return _measure_text(length, length, length)


def _measure_dropped(config: RunConfig) -> Measures:
    length = config.data.encoder_seq_length
    _, num_dropped = drop_lengths(length, config.objective.mask_prob)
    return _measure_text(length, num_dropped + 1, num_dropped + 1)


def _measure_pairs(config: RunConfig) -> Measures:
    """Rows are as long as the run says, whatever stands in them."""
    length = config.data.encoder_seq_length
    decoder_length = config.data.decoder_seq_length or length
    return _measure_text(length, decoder_length, decoder_length)


def _measure_text(encoder_length: int, decoder_length: int, mean_targets: float) -> Measures:
    """Text to text: every position of the decoder is a target."""
    measured = (
        Lengths(encoder=encoder_length, decoder=decoder_length, masked=0, targets=targets)
        for targets in (decoder_length, mean_targets)
    )
    return Measures(*measured)


MEASURES: dict[str, Callable[[RunConfig], Measures]] = {
    "metro": _measure_metro,
    "electra": _measure_electra,
    "spactor": _measure_spactor,
    "t5-span": _measure_spans,
    "t5-metro": _measure_metro_spans,
    "t5-iid": _measure_iid,
    "prefix-lm": _measure_prefix,
    "bert-style": _measure_restored,
    "mass-style": _measure_restored,
    "deshuffle": _measure_restored,
    "drop-tokens": _measure_dropped,
    "text-to-text": _measure_pairs,
}
