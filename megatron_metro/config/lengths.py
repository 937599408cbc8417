"""Sequence lengths and slot counts that follow from a run's objective: what fixes every static shape and FLOP count."""

from dataclasses import dataclass, replace

from megatron_metro.config.curriculum import largest_values
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.spans import span_lengths

SLOT_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Positions of one sequence. Slot counts are whole where shapes are meant, means where FLOPs are."""

    encoder: int
    decoder: int
    masked: float  # slots the generator fills and its head projects
    targets: float  # slots the LM head projects


def static_lengths(config: RunConfig) -> Lengths:
    """Lengths of what the loader delivers, whose slots suffice for the largest count a block can draw."""
    lengths = mean_lengths(config)
    if config.objective.objective == "t5-span":
        return lengths
    num_slots = count_slots(lengths.encoder, largest_values(config.objective).mask_prob)
    return replace(lengths, masked=num_slots if config.model.has_generator else 0, targets=num_slots)


def count_slots(sequence_length: int, mask_prob: float) -> int:
    """A static number of slots that always suffices for a count of floor(mask_prob x length + U), U in [0, 1)."""
    largest = int(mask_prob * sequence_length + 1)
    return -(-largest // SLOT_MULTIPLE) * SLOT_MULTIPLE


def mean_lengths(config: RunConfig) -> Lengths:
    """Lengths with the mean number of masked tokens of a full block, for FLOPs."""
    data, objective = config.data, config.objective
    encoder_length = data.encoder_seq_length
    if objective.objective == "t5-span":
        spans = span_lengths(encoder_length, objective.mask_prob, objective.mean_noise_span_length)
        decoder_length = data.decoder_seq_length or spans.decoder_length
        return Lengths(encoder=encoder_length, decoder=decoder_length, masked=0, targets=spans.decoder_length)
    masked = objective.mask_prob * encoder_length
    if not objective.probabilistic_rounding:
        masked = float(int(masked))
    return Lengths(
        encoder=encoder_length,
        decoder=data.decoder_seq_length or encoder_length,
        masked=masked if config.model.has_generator else 0,
        targets=masked,
    )
