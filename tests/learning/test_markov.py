"""It learns: 1,000 steps of metro-tiny on the Markov source, and a run that lacks one loss does not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_metro.device import Device
from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers.markov import Metrics, base_rate_entropy, markov_run, train, write_source
from tests.helpers.mutations import dropped_mlm, dropped_rtd

pytestmark = pytest.mark.full

NUM_STEPS = 1000


def find_failures(metrics: Metrics) -> list[str]:
    """Names of what has not been learnt; losses in nats, the others in percent."""
    rtd_bound = base_rate_entropy(metrics["replace_ratio"]) + 0.01
    learnt = {
        "lm_loss": metrics["lm_loss"] < 0.9,
        "mlm_loss": metrics["mlm_loss"] < 0.8,
        "rtd_loss": metrics["rtd_loss"] <= rtd_bound,
        "generator_accuracy": metrics["generator_accuracy"] > 80,
        "replace_ratio": metrics["replace_ratio"] < 5,
    }
    return [name for name, is_learnt in learnt.items() if not is_learnt]


@pytest.mark.parametrize(
    ("mutate", "missed"), [(None, None), (dropped_mlm, "mlm_loss"), (dropped_rtd, "rtd_loss")], ids=str
)
def test_it_learns_all_three_losses(
    mutate: Callable | None,
    missed: str | None,
    device: Device,
    groups: ParallelGroups,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
):
    run = markov_run(write_source(tmp_path), tmp_path / "run", NUM_STEPS)
    metrics = train(run, device, groups, mutate).held_out
    values = {
        name: metrics[name] for name in ("mlm_loss", "lm_loss", "rtd_loss", "generator_accuracy", "replace_ratio")
    }
    values["base_rate_entropy"] = base_rate_entropy(metrics["replace_ratio"])
    figures = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
    print(figures)
    record_property(f"held-out text after {NUM_STEPS} steps, {mutate.__name__ if mutate else 'all losses'}", figures)
    failures = find_failures(metrics)
    assert missed in failures if missed else failures == []
