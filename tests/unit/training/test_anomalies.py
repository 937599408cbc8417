"""What the guard of a run makes of the numbers of its steps; the engine is scripted."""

import json
import random
import sys
from math import inf, nan

import pytest

from megatron_metro.config.errors import NumericError
from megatron_metro.config.schema import CheckpointConfig, OptimizerConfig, RunConfig, TrainingConfig
from megatron_metro.training.anomalies import LEAST_STEPS, WINDOW_STEPS, AnomalyGuard, spike_limit
from megatron_metro.training.engine import StepResult
from megatron_metro.training.optimizer import StepOutcome
from megatron_metro.training.reporting import ANOMALIES_FILE, Reporter
from megatron_metro.training.state import TrainState, restore_state


class ScriptedEngine:
    """Steps whose losses and gradient norms are given: (loss, norm) or (loss, norm, loss scale)."""

    def __init__(self, *steps):
        self.steps = list(steps)

    def train_step(self, microbatches, accepts):
        loss, norm, *scale = self.steps.pop(0)
        metrics = {"total loss": loss}
        updated = norm < inf and loss < inf and accepts(metrics)
        return StepResult(metrics, StepOutcome(updated=updated, grad_norm=norm, loss_scale=scale[0] if scale else 1.0))

    def find_nonfinite(self):
        return True, ["encoder.layers.0.weight"]


@pytest.fixture
def play(groups, tmp_path, capsys):
    """Runs scripted steps under a guard: the last state, and what stands in the file of anomalies."""

    def run_steps(*steps, state=None, optimizer=None, **training):
        run = RunConfig(
            training=TrainingConfig(train_iters=1000, **training),
            optimizer=optimizer or OptimizerConfig(),
            checkpoint=CheckpointConfig(save=str(tmp_path)),
        )
        state = state or TrainState()
        reporter = Reporter(run, groups, train_iters=1000, start_iteration=state.iteration, stream=sys.stdout)
        guard = AnomalyGuard(run, ScriptedEngine(*steps), reporter)
        for _ in steps:
            _, state = guard.step(state, [], 8)
        guard.check_end(state)
        path = tmp_path / ANOMALIES_FILE
        return state, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return run_steps


GOOD, BAD = (3.0, 1.0), (nan, nan)


def test_a_broken_step_is_skipped_recorded_and_forgotten(play, capsys):
    state, entries = play(GOOD, BAD, GOOD, (3.0, inf), GOOD)
    assert (state.iteration, state.skipped_iterations, state.consumed_samples) == (5, 2, 40)
    assert (state.nonfinite_in_a_row, state.num_updates) == (0, 3)
    assert state.recent_losses == (3.0, 3.0, 3.0, 3.0)
    assert [(e["kind"], e["iteration"], e["first_sample"], e["last_sample"]) for e in entries] == [
        ("nonfinite", 2, 8, 15),
        ("nonfinite", 4, 24, 31),
    ]
    assert entries[0]["loss_ranks"] == [0] and entries[0]["weights"] == ["encoder.layers.0.weight"]
    assert entries[0]["total_loss"] is None
    assert "samples 8 to 15 changed no weight (1 in a row" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [1, 3])
def test_a_run_stops_after_so_many_in_a_row(play, limit):
    with pytest.raises(NumericError, match=f"--max-nonfinite-steps {limit}: iteration {limit + 4} "):
        play(GOOD, BAD, GOOD, GOOD, *[BAD] * 9, max_nonfinite_steps=limit) if limit > 1 else play(
            GOOD, GOOD, GOOD, GOOD, BAD, max_nonfinite_steps=1
        )


def test_what_is_counted_in_a_row_survives_a_resume(play):
    state, _ = play(GOOD, BAD, BAD, max_nonfinite_steps=3)
    assert state.nonfinite_in_a_row == 2
    with pytest.raises(NumericError, match="number 3 in a row"):
        play(BAD, state=state, max_nonfinite_steps=3)


def test_a_run_that_never_had_a_finite_step_fails_at_its_end(play):
    with pytest.raises(NumericError, match="no weight has changed"):
        play(BAD, BAD, BAD)


def test_a_falling_loss_scale_is_no_fault_until_it_is_at_its_floor(play):
    fp16 = OptimizerConfig(fp16=True, min_loss_scale=4.0)
    overflows = [(3.0, inf, 2.0**power) for power in range(16, 2, -1)]
    state, entries = play(*overflows, GOOD, optimizer=fp16, max_nonfinite_steps=2)
    assert (state.skipped_iterations, entries) == (14, [])
    at_floor = [(3.0, inf, 4.0)] * 2
    with pytest.raises(NumericError, match="at --min-loss-scale 4"):
        play(*overflows, *at_floor, optimizer=fp16, max_nonfinite_steps=2)


@pytest.mark.parametrize("step", [(nan, nan, 2.0**16), (inf, 1.0, 2.0**16)])
def test_no_loss_scale_cures_a_loss(play, step):
    with pytest.raises(NumericError):
        play(GOOD, step, step, optimizer=OptimizerConfig(fp16=True), max_nonfinite_steps=2)


def falling_losses(count: int, seed: int = 3) -> list[tuple[float, float]]:
    noise = random.Random(seed)
    return [(3.0 + 2.0 * 0.98**step + noise.gauss(0.0, 0.05), 1.0) for step in range(count)]


def test_healthy_losses_are_no_spikes(play):
    _, entries = play(*falling_losses(600))
    assert entries == []


def test_a_spike_is_reported_once_and_counts(play):
    losses = falling_losses(200)
    losses[150:153] = [(7.0, 1.0)] * 3
    state, entries = play(*losses)
    assert [(e["kind"], e["iteration"], e["updated"]) for e in entries] == [("loss spike", 151, True)]
    assert state.skipped_iterations == 0


def test_a_spike_may_be_skipped_and_neither_it_nor_a_nan_moves_the_window(play):
    losses = falling_losses(300)
    losses[150:170] = [(30.0, 10.0)] * 20
    losses[120:124] = [BAD] * 4
    state, entries = play(*losses, loss_spike_policy="skip")
    assert state.skipped_iterations == 24  # the spikes and the broken ones, no healthy step
    assert [e["iteration"] for e in entries if e["kind"] == "loss spike"] == [151]


def test_the_window_survives_a_resume(play):
    losses = falling_losses(200)
    losses[150] = (7.0, 1.0)
    state, _ = play(*losses[:150])
    restored = restore_state(json.loads(json.dumps({n: getattr(state, n) for n in state.__slots__})))
    assert restored == state and len(state.recent_losses) == WINDOW_STEPS
    _, entries = play(*losses[150:], state=restored)
    assert [e["iteration"] for e in entries] == [151]


def test_equal_losses_divide_by_nothing():
    assert spike_limit([0.0] * LEAST_STEPS, 10.0) == 0.0
    assert spike_limit([2.0] * LEAST_STEPS, 10.0) == pytest.approx(2.2)
    assert spike_limit([2.0] * (LEAST_STEPS - 1), 10.0) == inf
