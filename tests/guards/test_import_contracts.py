"""The import contracts of .importlinter hold, and each kind of violation breaks them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.repository import ROOT

LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", LINT], cwd=folder, capture_output=True, text=True, check=False)


def test_contracts_hold():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the package and its contracts."""
    shutil.copy(ROOT / ".importlinter", tmp_path)
    shutil.copytree(ROOT / "megatron_metro", tmp_path / "megatron_metro", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("data/probe.py", "import megatron_metro.model.probe"),
        ("model/probe.py", "import megatron_metro.data.probe"),
        ("losses/probe.py", "import megatron_metro.model.probe"),
        ("parallel/probe.py", "import megatron_metro.losses"),
        ("device.py", "import megatron_metro.parallel"),
        ("config/probe.py", "import torch"),
        ("config/probe.py", "import numpy"),
        ("config/probe.py", "import megatron_metro.batch"),
        ("analysis/probe.py", "import torch"),
        ("config/schema.py", "import megatron_metro.config.chain"),
        ("config/probe.py", "def load():\n    import torch"),
        ("unplaced/__init__.py", '"""A subpackage no layer names."""'),
    ],
)
def test_a_violation_breaks_them(checkout: Path, module: str, line: str):
    for name in ("data/probe.py", "model/probe.py"):
        (checkout / "megatron_metro" / name).write_text('"""Imported by other probes."""\n')
    path = checkout / "megatron_metro" / module
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(f"\n{line}\n")
    result = lint_imports(checkout)
    assert result.returncode == 1 and "BROKEN" in result.stdout, result.stdout + result.stderr
