"""Foreign packages and process-wide state have named doors (import-linter cannot name files or submodules)."""

import ast

import pytest

from tests.helpers.repository import is_inside, list_names, list_python_files, parse, relative

# Name -> files, or folders ending in a slash, that may use it. Tests may use anything.
DOORS = {
    "megatron": (
        "megatron_metro/device.py",
        "megatron_metro/parallel/",
        "megatron_metro/checkpoint/",
        "megatron_metro/model/",
        "megatron_metro/training/",
        "megatron_metro/data/indexed.py",
        "megatron_metro/data/mixture.py",
    ),
    "torch.distributed": (
        "megatron_metro/parallel/",
        "megatron_metro/checkpoint/",
        "megatron_metro/training/saving.py",
        "megatron_metro/training/loading.py",
        "megatron_metro/training/verification.py",
    ),
    "transformer_engine": ("megatron_metro/model/specs.py",),
    "transformers": ("megatron_metro/conversion/", "tools/"),
    "safetensors": ("megatron_metro/conversion/",),
    "datasets": ("megatron_metro/tasks/",),
    "argparse": ("megatron_metro/config/cli.py", "megatron_metro/config/parser.py", "tools/", "examples/"),
    "os.environ": ("megatron_metro/device.py", "megatron_metro/parallel/groups.py", "tools/"),
    "os.getenv": ("megatron_metro/device.py", "megatron_metro/parallel/groups.py", "tools/"),
    "os.putenv": (),
}


def find_trespasses(file: str, tree: ast.Module) -> list[str]:
    """Uses of a guarded name by a file that is none of its doors."""
    return [
        f"{file}:{line}: {name}"
        for name, line in list_names(tree)
        for guarded, doors in DOORS.items()
        if is_inside(name, guarded) and not file.startswith(doors)
    ]


def test_foreign_packages_are_used_at_their_doors_only():
    files = list_python_files("megatron_metro", "tools", "examples")
    assert [found for path in files for found in find_trespasses(relative(path), parse(path))] == []


@pytest.mark.parametrize(
    "source",
    [
        "import megatron.core",
        "from megatron.core import parallel_state",
        "def load():\n    from megatron.core.utils import divide",
        "import torch\ntorch.distributed.barrier()",
        "import torch.distributed as dist\ndist.barrier()",
        "from torch import distributed",
        "import os\nos.environ['A'] = 'b'",
        "from os import environ",
        "import argparse",
        "import transformers",
    ],
)
def test_a_use_elsewhere_is_found(source):
    assert find_trespasses("megatron_metro/losses/terms.py", ast.parse(source))


def test_similar_names_are_free():
    source = "import megatron_metro.device\nimport torch\nfrom os import path\ntorch.distributions.Normal"
    assert find_trespasses("megatron_metro/losses/terms.py", ast.parse(source)) == []
