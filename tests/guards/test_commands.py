"""Commands shown in the documentation exist and take the flags they are shown with."""

import re
import subprocess
import sys
from functools import cache

import pytest

from tests.helpers.repository import ROOT

PAGES = ("README.md", "CONTRIBUTING.md", "examples/README.md")
# A script and the rest of its command.
COMMAND = re.compile(r"(?:^|\s)((?:tools|examples|tests)/[\w/.-]+\.(?:py|sh))([^|;&>#\n]*)")
FLAG = re.compile(r"(?<!\S)--[a-z][\w-]*")


def find_commands(text: str) -> set[tuple[str, ...]]:
    """(script, flag, flag ...) of every command in a shell text."""
    joined = text.replace("\\\n", " ")
    return {(script, *FLAG.findall(rest)) for script, rest in COMMAND.findall(joined)}


def list_commands() -> list[tuple[str, ...]]:
    """All commands of the pages' ```bash blocks and of the example scripts."""
    blocks = [b for page in PAGES for b in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)]
    scripts = [path.read_text() for path in sorted((ROOT / "examples").glob("*.sh"))]
    return sorted(set().union(*map(find_commands, blocks + scripts)))


@cache
def read_help(script: str) -> str:
    """What `--help` prints."""
    command = [sys.executable, script] if script.endswith(".py") else ["bash", script]
    result = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, f"{script} --help failed: {result.stderr}"
    return result.stdout


@pytest.mark.parametrize("command", list_commands(), ids=" ".join)
def test_command_exists_and_takes_its_flags(command: tuple[str, ...]):
    script, *flags = command
    assert (ROOT / script).is_file()
    unknown = [flag for flag in flags if not re.search(rf"{re.escape(flag)}(?![\w-])", read_help(script))]
    assert unknown == [], f"{script} does not know them"


def test_the_two_commands_of_the_readme_are_there():
    scripts = {command[0] for command in find_commands((ROOT / "README.md").read_text())}
    assert {"examples/quickstart.sh", "tests/run.sh"} <= scripts


def test_commands_are_found():
    text = (
        'python tools/a.py --x "$y" \\\n    --z=1  # --comment\nbash examples/b.sh && tests/c.sh -q --w | cat --not\n'
    )
    assert find_commands(text) == {("tools/a.py", "--x", "--z"), ("examples/b.sh",), ("tests/c.sh", "--w")}
