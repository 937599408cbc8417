"""Command lines of all tools: argparse whose errors are ConfigErrors of one line that name the nearest flag."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from megatron_metro.config.errors import ConfigError
from megatron_metro.config.fields import NUMBER, WHOLE_NUMBER, shorten
from megatron_metro.config.legal import find_nearest


class Parser(argparse.ArgumentParser):
    """No abbreviations, each flag at most once, no empty values; --help keeps the description's lines."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, **options}, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage and ending the process."""
        raise ConfigError(f"{message.removeprefix('argument ')}; --help shows how it is given")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The values of a command line all of whose flags are this parser's; raises ConfigError."""
        flags = self.list_flags()
        for word in argv:
            if _is_flag(word) and word.partition("=")[0] not in flags:
                refuse_unknown([word], flags)
        self._check_words(argv, flags)
        return self.parse_args(argv)

    def read_own(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The values of this parser's flags and, apart, all other words; raises ConfigError."""
        self._check_words(argv, self.list_flags())
        return self.parse_known_args(argv)

    def list_flags(self) -> list[str]:
        """All spellings of all flags, those of commands included."""
        flags = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                flags += [flag for parser in action.choices.values() for flag in parser.list_flags()]
        return flags

    def _check_words(self, argv: Sequence[str], flags: Sequence[str]) -> None:
        given = [flag for flag in (word.partition("=")[0] for word in argv) if flag in flags]
        if repeated := [flag for flag in given if given.count(flag) > 1]:
            raise ConfigError(f"{repeated[0]}: already set; set it once")
        last = "the command line"
        for word in argv:
            last = word.partition("=")[0] if _is_flag(word) else last
            if last in flags and (not word.strip() or word == f"{last}="):
                raise ConfigError(f"{last}: found an empty value; give one or leave the flag out")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_shown = action.option_strings and isinstance(action.default, int | float | str) and action.default != ""
        if not is_shown or action.default is False or action.default == argparse.SUPPRESS:
            return action.help
        default = "on" if action.default is True else "%(default)s"
        return (action.help or "").removesuffix(" (default: %(default)s)") + f" (default: {default})"


def refuse_unknown(words: Sequence[str], flags: Iterable[str]) -> NoReturn:
    """Raise ConfigError for words that no parser took, naming the nearest of `flags`."""
    flag = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
    if flag is None:
        raise ConfigError(f"{shorten(words[0])} stands where a flag belongs; flags start with --")
    nearest = find_nearest("--" + flag.lstrip("-"), flags)
    raise ConfigError(f"{shorten(flag)} is not a flag; the nearest is {nearest} (--help lists all)")


def whole_number(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of a flag whose value is a whole number within bounds."""

    def read(text: str) -> int:
        if not WHOLE_NUMBER.fullmatch(text):
            raise argparse.ArgumentTypeError(f"{shorten(text)} is not a whole number; give digits only")
        if not minimum <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(f"{text} is not in {minimum}..{maximum}; give a number that is")
        return int(text)

    return read


def number(minimum: float, maximum: float) -> Callable[[str], float]:
    """The type of a flag whose value is a number within bounds."""

    def read(text: str) -> float:
        if not NUMBER.fullmatch(text) or not minimum <= float(text) <= maximum:
            raise argparse.ArgumentTypeError(f"{shorten(text)} is not a number from {minimum} to {maximum}; give one")
        return float(text)

    return read


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not NUMBER.fullmatch(word) and word != "-"
