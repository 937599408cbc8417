"""Schedules of loss weights and masking rates: values, bounds, what a run makes of them, one-line errors."""

from dataclasses import replace

import pytest

from megatron_metro.config.batches import batch_size_at, count_completed_steps
from megatron_metro.config.cli import parse_run
from megatron_metro.config.curriculum import find_schedules, largest_values, objective_at, scheduled_values
from megatron_metro.config.errors import ConfigError
from megatron_metro.config.lengths import count_slots, static_lengths
from megatron_metro.config.schema import ObjectiveConfig, TrainingConfig
from megatron_metro.config.validation import validate

RISE = ObjectiveConfig(rtd_loss_weight_schedule="100:0,300:50,301:20", mask_prob_schedule="0:0.1,10:0.3")


def test_values_are_linear_between_points_and_constant_outside():
    values = [objective_at(RISE, step).rtd_loss_weight for step in (0, 100, 150, 200, 300, 301, 10**9)]
    assert values == [0.0, 0.0, 12.5, 25.0, 50.0, 20.0, 20.0]
    assert objective_at(RISE, 5) == replace(RISE, rtd_loss_weight=0.0, mask_prob=0.2)
    assert objective_at(ObjectiveConfig(), 5) == ObjectiveConfig()


def test_largest_values_and_log_names():
    assert largest_values(RISE) == replace(RISE, rtd_loss_weight=50.0, mask_prob=0.3)
    assert largest_values(replace(RISE, mask_prob=0.4)).mask_prob == 0.4
    assert scheduled_values(RISE, 200) == {"rtd loss weight": 25.0, "mask prob": 0.3}


def test_slots_suffice_for_every_step():
    run = parse_run(["--preset", "metro-tiny", "--mask-prob-schedule", "0:0.1,10:0.3,20:0.2"], 1)
    assert static_lengths(run).masked == count_slots(run.data.encoder_seq_length, 0.3)
    flags = "--preset spactor-base --spactor-mask-prob 0.1 --spactor-mask-prob-schedule 0:0.1,10:0.3"
    run = parse_run(flags.split(), 1)
    assert static_lengths(run).masked == count_slots(568 - 85, 0.3)
    assert static_lengths(run).decoder == 114


def test_steps_are_counted_by_samples_also_in_a_ramp():
    training = TrainingConfig(global_batch_size=32, rampup_batch_size=(8, 8, 100), train_iters=100)
    consumed = 0
    for step in range(30):
        assert count_completed_steps(training, consumed) == step
        consumed += batch_size_at(training, consumed)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0:0,100", ["'100'", "STEP:VALUE"]),
        ("5", ["'5'", "STEP:VALUE"]),
        ("0:1,,5:2", ["''", "STEP:VALUE"]),
        ("-5:1", ["'-5:1'", "STEP:VALUE"]),
        ("1.5:1", ["'1.5:1'", "STEP:VALUE"]),
        ("0:x", ["'x'", "finite number"]),
        ("0:nan", ["'nan'", "finite number"]),
        ("0:-1", ["-1.0 is too small", "at least 0.0"]),
        ("10:1,10:2", ["step 10 comes after step 10", "ascending"]),
        ("10:1,5:2", ["step 5 comes after step 10"]),
    ],
)
def test_a_schedule_that_cannot_be_read_is_one_line(text, parts):
    with pytest.raises(ConfigError) as caught:
        find_schedules(ObjectiveConfig(mlm_loss_weight_schedule=text))
    for part in ("--mlm-loss-weight-schedule", *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--mask-prob-schedule 0:0.1,9:1", ["--mask-prob-schedule", "1.0 is too large", "less than 1.0"]),
        (
            "--objective t5-span --generator-num-layers 0 --mask-prob-schedule 0:0.1",
            ["--mask-prob-schedule 0:0.1", "t5-span", "static"],
        ),
        ("--objective spactor --mask-prob-schedule 0:0.1", ["--mask-prob-schedule", "--spactor-mask-prob-schedule"]),
        ("--objective deshuffle --mask-prob-schedule 0:0.1", ["--mask-prob-schedule", "of no use", "deshuffle"]),
        ("--objective t5-iid --mask-prob-schedule 0:0.1,9:0.6", ["--mask-prob-schedule", "at most 0.5"]),
        ("--spactor-mask-prob-schedule 0:0.1", ["--spactor-mask-prob-schedule 0:0.1", "--objective metro"]),
        (
            "--objective t5-iid --vocab-extra-ids 30 --mask-prob 0.1 --mask-prob-schedule 0:0.1,9:0.4",
            ["--vocab-extra-ids 30", "52 spans"],
        ),
        ("--generator-num-layers 0 --mlm-loss-weight-schedule 0:1", ["--mlm-loss-weight-schedule 0:1", "generator"]),
        ("--rtd-head none --rtd-loss-weight-schedule 0:1", ["--rtd-loss-weight-schedule 0:1", "RTD head"]),
        (
            "--mlm-loss-weight 0 --rtd-loss-weight-schedule 0:0 --lm-loss-weight 0",
            ["--mlm-loss-weight, --rtd-loss-weight and --lm-loss-weight are all 0"],
        ),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(words, parts):
    with pytest.raises(ConfigError) as caught:
        validate(parse_run(["--preset", "metro-tiny", *words.split()], 1), 1)
    for part in parts:
        assert part in str(caught.value)


def test_a_schedule_replaces_its_setting():
    """Weights of 0 are no error where a schedule raises them."""
    words = "--mlm-loss-weight 0 --rtd-loss-weight 0 --lm-loss-weight 0 --rtd-loss-weight-schedule 0:0,9:1"
    run = parse_run(["--preset", "metro-tiny", *words.split()], 1)
    assert run.objective.rtd_loss_weight == 0
    assert [objective_at(run.objective, step).rtd_loss_weight for step in (0, 9, 20)] == [0, 1, 1]
