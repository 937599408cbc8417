"""The schema seen as a list of settings, one per flag: types and bounds, and text turned into checked values."""

import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields, replace
from functools import cache
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from megatron_metro.config.errors import ConfigError
from megatron_metro.config.schema import RunConfig

Scalar: TypeAlias = bool | int | float | str
Value: TypeAlias = Scalar | tuple[Scalar, ...] | None

MAX_SHOWN = 80  # characters of a value in a message
WHOLE_NUMBER = re.compile(r"[+-]?\d{1,18}", re.ASCII)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One field of one section and everything its flag has to know."""

    section: str
    name: str
    kind: type  # bool, int, float or str
    is_optional: bool
    is_list: bool
    length: int | None  # number of values of a list; None for one or more
    choices: tuple[str, ...]
    default: Any
    metadata: Mapping[str, Any]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def flags(self) -> tuple[str, ...]:
        """The flag and its aliases."""
        return (self.flag, self.metadata["alias"]) if "alias" in self.metadata else (self.flag,)

    @property
    def negatives(self) -> tuple[str, ...]:
        """Flags that switch a boolean off: `--no-x` always, `--disable-x` too where it is on by default."""
        if self.kind is not bool:
            return ()
        stem = self.flag.removeprefix("--")
        spellings = ["--" + stem.removeprefix("no-") if stem.startswith("no-") else "--no-" + stem]
        if self.default is True:
            spellings.append(self.metadata.get("negative", "--disable-" + stem))
        return tuple(spellings)


@cache
def list_settings() -> dict[str, Setting]:
    """All settings of a run by field name, in the order of the schema; field names are unique across sections."""
    hints = get_type_hints(RunConfig)
    settings = [
        _describe(section.name, field, hint)
        for section in fields(RunConfig)
        for field, hint in zip(fields(hints[section.name]), get_type_hints(hints[section.name]).values(), strict=True)
    ]
    by_name = {setting.name: setting for setting in settings}
    assert len(by_name) == len(settings)
    return by_name


def _describe(section: str, field: "Field[Any]", hint: Any) -> Setting:
    is_optional = get_origin(hint) in (Union, types.UnionType)
    if is_optional:
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    is_list = get_origin(hint) is tuple
    if is_list:
        hint = get_args(hint)[0]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    nargs = field.metadata.get("nargs")
    return Setting(
        section=section,
        name=field.name,
        kind=str if choices else hint,
        is_optional=is_optional,
        is_list=is_list,
        length=nargs if isinstance(nargs, int) else None,
        choices=choices,
        default=field.default,
        metadata=field.metadata,
    )


def parse_text(setting: Setting, text: str, label: str) -> Scalar:
    """The value that `text` spells, checked; `label` says where it was found (a flag, or a line of a file)."""
    if not text.strip():
        raise ConfigError(f"{label}: found an empty value; give one or leave the setting out")
    value = _PARSERS[setting.kind](text, label)
    check_scalar(setting, value, label)
    return value


def _parse_bool(text: str, label: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ConfigError(f"{label}: {shorten(text)} is not a truth value; write true or false")
    return text.lower() == "true"


def _parse_int(text: str, label: str) -> int:
    if WHOLE_NUMBER.fullmatch(text):
        return int(text)
    number = float(text) if NUMBER.fullmatch(text) else math.nan
    fix = f"write {int(number)}" if number.is_integer() and abs(number) < 10**18 else "give digits only, below 10^18"
    raise ConfigError(f"{label}: {shorten(text)} is not a whole number; {fix}")


def _parse_float(text: str, label: str) -> float:
    number = float(text) if NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{label}: {shorten(text)} is not a finite number; write one like 0.1 or 4e-4")
    return number


def _parse_str(text: str, label: str) -> str:
    if text.startswith("--") or not text.isprintable():
        raise ConfigError(f"{label}: {shorten(text)} is not a value; give printable text that does not start with --")
    return text


_PARSERS: dict[type, Callable[[str, str], Scalar]] = {
    bool: _parse_bool,
    int: _parse_int,
    float: _parse_float,
    str: _parse_str,
}


def check_scalar(setting: Setting, value: Scalar, label: str) -> None:
    """Refuse a value outside its choices or bounds."""
    if setting.choices and value not in setting.choices:
        raise ConfigError(f"{label}: {shorten(value)} is not one of {', '.join(setting.choices)}")
    if isinstance(value, bool | str):
        return
    bounds = setting.metadata
    if not math.isfinite(value):
        raise ConfigError(f"{label}: {value} is not a finite number; give one")
    if "minimum" in bounds and value < bounds["minimum"]:
        raise ConfigError(f"{label}: {value} is too small; give at least {bounds['minimum']}")
    if "maximum" in bounds and value > bounds["maximum"]:
        raise ConfigError(f"{label}: {value} is too large; give at most {bounds['maximum']}")
    if "above" in bounds and value <= bounds["above"]:
        raise ConfigError(f"{label}: {value} is too small; give more than {bounds['above']}")
    if "below" in bounds and value >= bounds["below"]:
        raise ConfigError(f"{label}: {value} is too large; give less than {bounds['below']}")


def check_length(setting: Setting, values: tuple[Scalar, ...], label: str) -> None:
    """Refuse a list of the wrong length; an empty list is the same as leaving the setting out."""
    if values and setting.length is not None and len(values) != setting.length:
        raise ConfigError(f"{label}: found {len(values)} values; give {setting.length} ({setting.metadata['help']})")


def check_values(config: RunConfig) -> None:
    """Check every value of a run on its own, whether it came from a flag, a file or code."""
    for setting in list_settings().values():
        value = read_value(config, setting)
        if isinstance(value, tuple):
            check_length(setting, value, setting.flag)
        if value is None and not setting.is_optional:
            raise ConfigError(f"{setting.flag}: found no value; give one")
        for scalar in value if isinstance(value, tuple) else () if value is None else (value,):
            check_scalar(setting, scalar, setting.flag)


def read_value(config: RunConfig, setting: Setting) -> Value:
    """The value of one setting in a run."""
    value: Value = getattr(getattr(config, setting.section), setting.name)
    return value


def change_values(config: RunConfig, values: Mapping[str, Value]) -> RunConfig:
    """The same run with some settings, given by field name, changed."""
    changes: dict[str, dict[str, Value]] = {}
    for name, value in values.items():
        changes.setdefault(list_settings()[name].section, {})[name] = value
    sections: dict[str, Any] = {
        section: replace(getattr(config, section), **changed) for section, changed in changes.items()
    }
    return replace(config, **sections)


def shorten(value: Scalar) -> str:
    """A value as it is shown in a message: quoted, escaped and never longer than a line."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
