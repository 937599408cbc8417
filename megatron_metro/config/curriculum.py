"""Loss weights and masking rates that change along a run: pure functions of the step, so that resuming needs no state.

`--rtd-loss-weight-schedule 0:0,10000:50` is a list of STEP:VALUE points. Between two points the value is linear in the
step, before the first and after the last it is constant, and two points a step apart are a jump. Step 0 is the run's
first. A schedule replaces its setting, with one exception: validation masks at the setting throughout, since the same
held-out batches are compared along the run.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from megatron_metro.config.errors import ConfigError
from megatron_metro.config.fields import WHOLE_NUMBER, list_settings, parse_text, shorten
from megatron_metro.config.schema import ObjectiveConfig

SUFFIX = "_schedule"
MASKING_RATES = ("mask_prob", "spactor_mask_prob")


@dataclass(frozen=True, slots=True)
class Schedule:
    """A piecewise linear function of the step."""

    points: tuple[tuple[int, float], ...]  # steps ascend

    def value_at(self, step: int) -> float:
        """The value of the step that follows `step` completed ones."""
        after = bisect_right(self.points, step, key=lambda point: point[0])
        if after in (0, len(self.points)):
            return self.points[max(after - 1, 0)][1]
        (start, first), (end, last) = self.points[after - 1 : after + 1]
        return first + (last - first) * ((step - start) / (end - start))

    @property
    def largest(self) -> float:
        """The largest value of any step."""
        return max(value for _, value in self.points)


def find_schedules(objective: ObjectiveConfig) -> dict[str, Schedule]:
    """The schedules of a run by the field they drive; ConfigError, one line, for one that cannot be read."""
    return {
        name.removesuffix(SUFFIX): _parse(name, text)
        for name in _schedule_names()
        if (text := getattr(objective, name)) is not None
    }


def objective_at(objective: ObjectiveConfig, step: int) -> ObjectiveConfig:
    """The objective with every scheduled value as it is in the step that follows `step` completed ones."""
    return _replace(objective, {name: found.value_at(step) for name, found in find_schedules(objective).items()})


def largest_values(objective: ObjectiveConfig) -> ObjectiveConfig:
    """The objective with the largest value of every loss weight and masking rate, which sizes what must not change.

    Of a masking rate that includes the setting itself, the rate of validation.
    """
    largest = {name: found.largest for name, found in find_schedules(objective).items()}
    for name in set(MASKING_RATES) & largest.keys():
        largest[name] = max(largest[name], getattr(objective, name))
    return _replace(objective, largest)


def scheduled_values(objective: ObjectiveConfig, step: int) -> dict[str, float]:
    """What the log shows: each scheduled value under its name in words."""
    return {name.replace("_", " "): found.value_at(step) for name, found in find_schedules(objective).items()}


def _replace(objective: ObjectiveConfig, values: Mapping[str, Any]) -> ObjectiveConfig:
    return replace(objective, **values)


@lru_cache(maxsize=1)
def _schedule_names() -> tuple[str, ...]:
    settings = list_settings()
    return tuple(name for name in settings if name.endswith(SUFFIX) and name.removesuffix(SUFFIX) in settings)


@lru_cache(maxsize=64)
def _parse(name: str, text: str) -> Schedule:
    flag, setting = list_settings()[name].flag, list_settings()[name.removesuffix(SUFFIX)]
    points = []
    for point in text.split(","):
        step, colon, value = point.strip().partition(":")
        if not (colon and WHOLE_NUMBER.fullmatch(step) and int(step) >= 0):
            raise ConfigError(
                f"{flag} {shorten(text)}: {shorten(point)} is not STEP:VALUE; write one like 0:0,10000:50"
            )
        points.append((int(step), float(parse_text(setting, value, f"{flag} {shorten(text)}"))))
    for (before, _), (after, _) in pairwise(points):
        if after <= before:
            raise ConfigError(f"{flag} {shorten(text)}: step {after} comes after step {before}; give ascending steps")
    return Schedule(tuple(points))
