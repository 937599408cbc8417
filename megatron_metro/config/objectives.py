"""What each objective asks of the rest of a run: generator, sentinels, blocks, targets."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from megatron_metro.config.batches import count_steps
from megatron_metro.config.curriculum import largest_values
from megatron_metro.config.legal import require
from megatron_metro.config.lengths import measure_runs
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.spans import count_noise, metro_span_lengths, span_lengths


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirements:
    """What an objective can be combined with."""

    reads_pairs: bool = False  # sources and targets from JSON lines; all others make two sides of one text
    generator: Literal["none", "optional", "needed"] = "none"
    lm_targets: tuple[str, ...] = ("masked",)
    masks_tokens: bool = False  # one by one, or with --mask-spans in spans
    takes_lines: bool = False  # blocks of --block-mode complete_doc
    # What --mask-prob is to it: nothing, what decides how much text a block holds, or free to change along a run.
    mask_prob: Literal["unused", "sizes", "free"] = "sizes"
    count_spans: Callable[[RunConfig], int] | None = None  # the most sentinels that mark spans of one block


def _count_spans(config: RunConfig) -> int:
    objective = config.objective
    return span_lengths(config.data.encoder_seq_length, objective.mask_prob, objective.mean_noise_span_length).num_spans


def _count_metro_spans(config: RunConfig) -> int:
    objective, length = config.objective, config.data.encoder_seq_length
    return metro_span_lengths(length, objective.mask_prob, objective.mean_noise_span_length).num_spans


def _count_runs(config: RunConfig) -> int:
    """And the final sentinel."""
    raw_length = config.data.encoder_seq_length - 1
    return measure_runs(raw_length, count_noise(raw_length, config.objective.mask_prob))[0] + 1


SHORTEST_TARGET = 2  # a token and </s>
MOST_RUNS = 0.5  # the share of noise tokens at which they form the most runs
OBJECTIVES: dict[str, Requirements] = {
    "metro": Requirements(
        generator="optional",
        lm_targets=("masked", "all", "masked-only"),
        masks_tokens=True,
        takes_lines=True,
        mask_prob="free",
    ),
    "electra": Requirements(
        generator="needed", lm_targets=("masked", "all"), masks_tokens=True, takes_lines=True, mask_prob="free"
    ),
    # Without a generator it is span corruption alone, as after its stage switch.
    "spactor": Requirements(generator="optional", count_spans=_count_spans),
    "t5-span": Requirements(count_spans=_count_spans),
    "t5-metro": Requirements(
        lm_targets=("masked", "all"), takes_lines=True, count_spans=_count_metro_spans, mask_prob="free"
    ),
    "t5-iid": Requirements(count_spans=_count_runs, mask_prob="free"),
    "prefix-lm": Requirements(mask_prob="unused"),
    "bert-style": Requirements(mask_prob="free"),
    "mass-style": Requirements(mask_prob="free"),
    "deshuffle": Requirements(mask_prob="unused"),
    "drop-tokens": Requirements(),
    "text-to-text": Requirements(mask_prob="unused", reads_pairs=True),
}
# Those whose sides are made of one text.
PRETRAINING = tuple(name for name, needs in OBJECTIVES.items() if not needs.reads_pairs)


def _check_rates(config: RunConfig, needs: Requirements) -> None:
    """Masking rates change along a run only where they are used and decide no static length."""
    objective = config.objective
    name, schedule = f"--objective {objective.objective}", objective.mask_prob_schedule
    if schedule is not None:
        require(needs.mask_prob != "unused", f"--mask-prob-schedule {schedule} is of no use to {name}; drop it")
        others = (
            "--spactor-mask-prob-schedule" if name.endswith("spactor") else "--objective t5-iid, bert-style or metro"
        )
        require(
            needs.mask_prob == "free",
            f"--mask-prob-schedule {schedule} would change how much text a block of {name} holds, which is static; "
            f"drop it, or give {others}",
        )
        require(
            objective.objective != "t5-iid" or largest_values(objective).mask_prob <= MOST_RUNS,
            f"--mask-prob-schedule {schedule} passes {MOST_RUNS}, from where on {name} needs fewer sentinels than on "
            f"the way; give at most {MOST_RUNS}",
        )
    require(
        objective.spactor_mask_prob_schedule is None
        or (objective.objective == "spactor" and config.model.has_generator),
        f"--spactor-mask-prob-schedule {objective.spactor_mask_prob_schedule} is for --objective spactor with a "
        f"generator, found {name} and --generator-num-layers {config.model.generator_num_layers}; drop it",
    )


def _check_pairs(config: RunConfig, needs: Requirements) -> None:
    """What is asked of examples is asked of an objective that has them, and their targets have room."""
    data, name = config.data, f"--objective {config.objective.objective}"
    for flag, is_given in (
        ("--pack-examples", data.pack_examples),
        ("--truncate-source", data.truncate_source),
        ("--truncate-target", data.truncate_target),
    ):
        require(
            needs.reads_pairs or not is_given,
            f"{flag} is about sources and targets, found {name}; drop it or give --objective text-to-text",
        )
    require(
        not needs.reads_pairs or data.decoder_seq_length is None or data.decoder_seq_length >= SHORTEST_TARGET,
        f"--decoder-seq-length {data.decoder_seq_length} leaves no room for a token and </s>; give at least "
        f"{SHORTEST_TARGET}",
    )


def has_decoder(config: RunConfig) -> bool:
    """Whether anything is written."""
    return config.objective.objective != "electra"


def targets_are_masked_slots(config: RunConfig) -> bool:
    """Whether slot i of the LM head and slot i of the generator stand for the same token, for all i."""
    return OBJECTIVES[config.objective.objective].masks_tokens and config.objective.lm_targets != "all"


def find_switch(config: RunConfig) -> int | None:
    """The step at which SPACTOR drops its generator, if it does in a run that is long enough."""
    is_first_stage = config.objective.objective == "spactor" and config.model.has_generator
    return config.objective.spactor_tau if is_first_stage else None


def check_switch(config: RunConfig) -> None:
    """SPACTOR's second stage starts from what its first one saves, the optimizer's state included."""
    tau, num_steps = find_switch(config), count_steps(config.training)
    if tau is None or num_steps is None or num_steps <= tau:
        return
    checkpoint = config.checkpoint
    require(
        checkpoint.save is not None,
        f"--spactor-tau {tau} is a save and a load within the {num_steps} steps of the run; give --save, or "
        "--spactor-tau none",
    )
    require(
        not checkpoint.no_save_optim,
        f"--no-save-optim leaves out what the steps after --spactor-tau {tau} go on with; drop it",
    )


def check_data_of_objective(config: RunConfig) -> None:
    """The objective gets the model, the blocks and the sentinels it needs, and no flag that it does not heed."""
    objective, num_layers = config.objective, config.model.generator_num_layers
    name, needs = f"--objective {objective.objective}", OBJECTIVES[objective.objective]
    require(
        needs.generator != "none" or not config.model.has_generator,
        f"{name} has no generator, found --generator-num-layers {num_layers}; give 0",
    )
    require(
        needs.generator != "needed" or config.model.has_generator,
        f"{name} detects what a generator replaced, found --generator-num-layers {num_layers}; give at least 1",
    )
    require(
        objective.lm_targets in needs.lm_targets,
        f"{name} has no --lm-targets {objective.lm_targets}; give {' or '.join(needs.lm_targets)}",
    )
    require(
        needs.masks_tokens or not objective.mask_spans,
        f"--mask-spans changes what metro and electra mask, found {name}; drop it",
    )
    _check_rates(config, needs)
    _check_pairs(config, needs)
    require(
        needs.takes_lines or config.data.block_mode == "full",
        f"{name} corrupts full blocks, found --block-mode {config.data.block_mode}; give full",
    )
    require(
        not objective.weighted_lm_loss or targets_are_masked_slots(config),
        "--weighted-lm-loss weighs the LM loss at masked positions, found "
        f"{name} and --lm-targets {objective.lm_targets}; drop it",
    )
    if needs.count_spans is None:
        return
    # The tokenizer, not known here, says whether one more is needed; METRO's does.
    largest = replace(config, objective=largest_values(objective))
    num_spans, extra_ids = needs.count_spans(largest), config.tokenizer.vocab_extra_ids
    require(
        extra_ids >= num_spans,
        f"--vocab-extra-ids {extra_ids} are too few for {num_spans} spans; give at least {num_spans + 1}",
    )
