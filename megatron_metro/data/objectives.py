"""What every pretraining objective offers, and which one a run asks for.

An objective states how many tokens a block has, the shape of what it makes, and makes it: one small file each.
"""

from dataclasses import replace
from typing import Protocol

from megatron_metro.batch import Microbatch, MicrobatchShape
from megatron_metro.config.curriculum import largest_values
from megatron_metro.config.errors import ConfigError
from megatron_metro.config.schema import DataConfig, RunConfig
from megatron_metro.config.spans import span_lengths
from megatron_metro.data.blocks import Blocks
from megatron_metro.data.metro_objective import MetroObjective
from megatron_metro.data.span_objective import build_span_objective
from megatron_metro.tokenizer import Vocabulary


class Objective(Protocol):
    """What a loader and a pipeline need to know of a pretraining objective."""

    @property
    def raw_length(self) -> int:
        """Tokens of a block, <s> included where `has_bos`."""

    @property
    def has_bos(self) -> bool:
        """Whether a block starts with <s>."""

    def shape(self, micro_batch_size: int) -> MicrobatchShape:
        """Shape of every microbatch this objective makes of so many blocks."""

    def make_batch(self, blocks: Blocks) -> Microbatch:
        """The microbatch of these blocks; row i depends on row i alone."""


def build_objective(run: RunConfig, vocabulary: Vocabulary) -> Objective:
    """The objective a run asks for; ConfigError when its lengths or its sentinels do not work out."""
    config, data = run.objective, run.data
    if config.objective == "metro":
        _check_decoder_length(data, data.encoder_seq_length, "metro")
        return MetroObjective(
            vocabulary=vocabulary,
            sequence_length=data.encoder_seq_length,
            mask_prob=config.mask_prob,
            mask_token_prob=config.mask_token_prob,
            mask_random_prob=config.mask_random_prob,
            mask_special_tokens=config.mask_special_tokens,
            rounds_at_random=config.probabilistic_rounding,
            has_generator=run.model.has_generator,
            is_padded=data.block_mode == "complete_doc",
            largest_mask_prob=largest_values(config).mask_prob if config.mask_prob_schedule else None,
        )
    if data.block_mode != "full":
        raise ConfigError(f"--objective t5-span corrupts full blocks; it cannot use --block-mode {data.block_mode}")
    lengths = span_lengths(data.encoder_seq_length, config.mask_prob, config.mean_noise_span_length)
    _check_decoder_length(data, lengths.decoder_length, "t5-span")
    return build_span_objective(lengths, data.encoder_seq_length, vocabulary)


def with_mask_prob(objective: Objective, mask_prob: float) -> Objective:
    """The same objective, with the same shapes, at another masking rate of its schedule."""
    assert isinstance(objective, MetroObjective), "--mask-prob-schedule is refused for other objectives"
    return replace(objective, mask_prob=mask_prob)


def _check_decoder_length(data: DataConfig, needed: int, objective: str) -> None:
    if data.decoder_seq_length not in (None, needed):
        raise ConfigError(
            f"--decoder-seq-length is {data.decoder_seq_length}; --objective {objective} with --encoder-seq-length "
            f"{data.encoder_seq_length} writes {needed}: leave it out"
        )
