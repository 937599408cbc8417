"""The two forms of a list of data sets: prefixes alone, or weight and prefix in turn."""

import math
from collections.abc import Sequence

from megatron_metro.config.errors import ConfigError
from megatron_metro.config.fields import NUMBER, shorten


def parse_blend(values: Sequence[str], flag: str) -> tuple[tuple[float | None, str], ...]:
    """(weight, prefix) of each data set of `flag`; the weight is None where none are given (then sizes decide)."""
    weights = [value for value in values[::2] if _is_number(value)]
    if not weights or len(values) == 1:
        prefixes = [value for value in values if _is_number(value)] if len(values) > 1 else []
        if prefixes:
            raise ConfigError(
                f"{flag}: found {shorten(prefixes[0])} after a prefix; write each weight before its prefix"
            )
        return tuple((None, value) for value in values)
    if len(weights) != len(values[::2]) or len(values) % 2:
        raise ConfigError(f"{flag}: found {len(weights)} weights in {len(values)} values; write weight prefix in turn")
    pairs = tuple((float(weight), prefix) for weight, prefix in zip(values[::2], values[1::2], strict=True))
    for weight, prefix in pairs:
        if not math.isfinite(weight) or weight <= 0:
            raise ConfigError(
                f"{flag}: {shorten(prefix)} has weight {weight:g}; give a positive number or leave it out"
            )
        if _is_number(prefix):
            raise ConfigError(f"{flag}: found {shorten(prefix)} where a prefix belongs; write weight prefix in turn")
    return pairs


def parse_split(text: str) -> tuple[float, float, float]:
    """Shares of training, validation and test from `--split`, scaled to sum 1."""
    parts = [part.strip() for part in text.split(",")]
    shares = [float(part) for part in parts if NUMBER.fullmatch(part)]
    if len(parts) != 3 or len(shares) != 3 or min(shares) < 0 or not math.isfinite(sum(shares)) or shares[0] == 0:
        raise ConfigError(
            f"--split: {shorten(text)} is not three shares with the first above 0; write one like 969,30,1"
        )
    total = sum(shares)
    return shares[0] / total, shares[1] / total, shares[2] / total


def _is_number(text: str) -> bool:
    return NUMBER.fullmatch(text) is not None or text.lower().lstrip("+-") in ("nan", "inf", "infinity")
