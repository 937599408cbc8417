"""Words for checks across settings: refuse, and name the nearest values that would work."""

import difflib
from collections.abc import Iterable

from megatron_metro.config.errors import ConfigError


def require(is_legal: bool, message: str) -> None:
    """Raise ConfigError with `message` unless the condition holds."""
    if not is_legal:
        raise ConfigError(message)


def nearest_multiples(value: int, divisor: int) -> str:
    """The positive multiples of `divisor` on either side of `value`."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)


def nearest_divisors(value: int, divisor: int) -> str:
    """The divisors of `value` on either side of `divisor`."""
    divisors = [candidate for candidate in range(1, min(value, 4 * divisor) + 1) if value % candidate == 0]
    below = [candidate for candidate in divisors if candidate < divisor]
    above = [candidate for candidate in divisors if candidate > divisor]
    return " or ".join(str(candidate) for candidate in below[-1:] + above[:1])


def find_nearest(name: str, names: Iterable[str]) -> str:
    """The name that looks most like what was written."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]
