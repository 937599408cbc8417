"""What every objective offers, and which one a run asks for.

An objective states how many tokens a block has, the shape of what it makes, and makes it: one small file each.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from megatron_metro.batch import Microbatch, MicrobatchShape
from megatron_metro.config.curriculum import largest_values, objective_at
from megatron_metro.config.errors import ConfigError
from megatron_metro.config.lengths import Lengths, static_lengths
from megatron_metro.config.objectives import OBJECTIVES
from megatron_metro.config.schema import RunConfig
from megatron_metro.data.blocks import Blocks
from megatron_metro.data.metro_objective import build_metro
from megatron_metro.data.metro_spans import build_metro_spans
from megatron_metro.data.pair_objective import build_pairs
from megatron_metro.data.spactor_objective import build_spactor
from megatron_metro.data.span_objective import build_spans
from megatron_metro.data.survey_objectives import (
    build_bert,
    build_deshuffle,
    build_drop,
    build_iid,
    build_mass,
    build_prefix,
)
from megatron_metro.tokenizer import Vocabulary


class Objective(Protocol):
    """What a loader and a pipeline need to know of an objective."""

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


BUILDERS: dict[str, Callable[[RunConfig, Vocabulary, Lengths], Objective]] = {
    "metro": build_metro,
    "electra": build_metro,
    "spactor": build_spactor,
    "t5-span": build_spans,
    "t5-metro": build_metro_spans,
    "t5-iid": build_iid,
    "prefix-lm": build_prefix,
    "bert-style": build_bert,
    "mass-style": build_mass,
    "deshuffle": build_deshuffle,
    "drop-tokens": build_drop,
    "text-to-text": build_pairs,
}


def build_objective(run: RunConfig, vocabulary: Vocabulary, step: int | None = None) -> Objective:
    """The objective a run asks for; ConfigError when its lengths or its sentinels do not work out.

    With `step`, at the masking rates of the step that follows so many completed ones; shapes are those of all steps.
    """
    name, data = run.objective.objective, run.data
    if data.block_mode != "full" and not OBJECTIVES[name].takes_lines:
        raise ConfigError(f"--objective {name} corrupts full blocks; it cannot use --block-mode {data.block_mode}")
    lengths = static_lengths(run)
    if step is not None:
        return BUILDERS[name](replace(run, objective=objective_at(run.objective, step)), vocabulary, lengths)
    # Sentinels suffice for every step where they do at the largest rates.
    BUILDERS[name](replace(run, objective=largest_values(run.objective)), vocabulary, lengths)
    objective = BUILDERS[name](run, vocabulary, lengths)
    needed = objective.shape(micro_batch_size=1).decoder_length
    if data.decoder_seq_length not in (None, needed):
        raise ConfigError(
            f"--decoder-seq-length is {data.decoder_seq_length}; --objective {name} with --encoder-seq-length "
            f"{data.encoder_seq_length} writes {needed}: leave it out"
        )
    return objective
