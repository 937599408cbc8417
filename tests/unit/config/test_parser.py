"""Command lines of tools: one line for every mistake, and help that says what is on by default."""

import pytest

from megatron_metro.config.errors import ConfigError
from megatron_metro.config.parser import Parser, number, whole_number


def make_parser() -> Parser:
    parser = Parser(description="Tool.\n\n  indented")
    parser.add_argument("--input", nargs="+", required=True, help="text")
    parser.add_argument("--workers", type=whole_number(1, 99), default=3, metavar="N", help="processes")
    parser.add_argument("--share", type=number(0, 1), default=0.5, help="a share")
    parser.add_argument("--fast", action="store_true", help="faster")
    return parser


def test_values():
    flags = make_parser().read(["--input", "a", "b", "--workers=7", "--share", "1e-2"])
    assert (flags.input, flags.workers, flags.share, flags.fast) == (["a", "b"], 7, 0.01, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "^the following arguments are required: --input; --help"),
        ("--inptu a", "^'--inptu' is not a flag; the nearest is --input"),
        ("--input a --fas", "^'--fas' is not a flag; the nearest is --fast"),
        ("--input a --workers", "^--workers: expected one argument"),
        ("--input a --workers x", "^--workers: 'x' is not a whole number"),
        ("--input a --workers 1e1", "^--workers: '1e1' is not a whole number"),
        ("--input a --workers 100", r"^--workers: 100 is not in 1\.\.99"),
        ("--input a --workers -1", r"^--workers: -1 is not in 1\.\.99"),
        ("--input a --share nan", "^--share: 'nan' is not a number from 0 to 1"),
        ("--input a --share 2", "^--share: '2' is not a number from 0 to 1"),
        ("--input a --workers 1 --workers=2", "^--workers: already set; set it once"),
        ("--input a --workers=", "^--workers: found an empty value"),
        ("--input a -x", "^'-x' is not a flag"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_parser().read(words.split())
    assert "\n" not in str(caught.value)


def test_an_empty_value_is_refused():
    with pytest.raises(ConfigError, match="--input: found an empty value"):
        make_parser().read(["--input", ""])


def test_other_flags_are_handed_on():
    flags, others = make_parser().read_own(["--lr", "", "--input", "a", "--fast", "--preset", "x"])
    assert (flags.input, flags.fast, others) == (["a"], True, ["--lr", "", "--preset", "x"])


def test_help_keeps_lines_and_shows_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser().read(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert "\n  indented\n" in shown
    assert "processes (default: 3)" in shown and "(default: 0.5)" in shown and "default: False" not in shown


def test_flags_of_commands():
    parser = Parser()
    parser.add_subparsers(dest="command", required=True).add_parser("step").add_argument("--rounds", type=int)
    assert parser.read(["step", "--rounds", "2"]).rounds == 2
    with pytest.raises(ConfigError, match="the nearest is --rounds"):
        parser.read(["step", "--round", "2"])
