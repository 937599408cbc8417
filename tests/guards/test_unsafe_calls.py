"""Static gate against code that runs what it reads: pickles, eval, shells, unsafe YAML, archives, remote model code."""

import ast

import pytest

from tests.helpers.repository import is_inside, list_names, list_python_files, parse, relative

UNSAFE_MODULES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
UNSAFE_NAMES = (
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.Loader",
    "yaml.UnsafeLoader",
    "yaml.FullLoader",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
)
# What unpickles files, or widens what weights-only loading lets through: not in the library; tests may read their own.
UNPICKLERS = (
    *(
        "numpy.lib.format",
        "pandas.read_pickle",
        "shutil.unpack_archive",
        "torch.hub",
        "torch.jit.load",
        "torch.package",
    ),
    *("torch.serialization.add_safe_globals", "torch.serialization.safe_globals"),
    *("torch.distributed.checkpoint.FileSystemReader", "torch.distributed.checkpoint.filesystem.FileSystemReader"),
    *("torch.distributed.checkpoint.load", "torch.distributed.checkpoint.load_state_dict"),
    *("torch.distributed.checkpoint.format_utils", "megatron.core.safe_globals"),
    *(f"megatron.core.dist_checkpointing.{name}" for name in ("load", "load_common_state_dict", "load_plain_tensors")),
    *(f"megatron.core.dist_checkpointing.{name}" for name in ("load_tensors_metadata", "load_sharded_metadata")),
    *(f"megatron.core.dist_checkpointing.serialization.{name}" for name in ("load", "load_plain_tensors")),
)
UNSAFE_METHODS = ("extractall",)
UNSAFE_ARGUMENTS = {"shell": True, "allow_pickle": True, "weights_only": False, "trust_remote_code": True}

# File -> names it may use all the same. An entry says why.
ALLOWED: dict[str, tuple[str, ...]] = {
    # Writes the pickles that must be refused.
    "tests/helpers/hostile.py": ("pickle", "pickle.dumps", "pickle.loads", "exec", "os.system"),
}


def find_unsafe(tree: ast.Module) -> list[tuple[str, int]]:
    """Uses of anything listed above, with their lines."""
    found = [
        (name, line)
        for name, line in list_names(tree)
        if name in UNSAFE_NAMES or any(is_inside(name, module) for module in UNSAFE_MODULES)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in UNSAFE_METHODS:
            found.append((node.attr, node.lineno))
        is_constant = isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant)
        if is_constant and node.arg in UNSAFE_ARGUMENTS and node.value.value is UNSAFE_ARGUMENTS[node.arg]:
            found.append((f"{node.arg}={node.value.value}", node.lineno))
    return found


def find_unpickling(tree: ast.Module) -> list[tuple[str, int]]:
    """Uses of what unpickles files, and calls of torch.load that leave it to the environment what they let through."""
    found = [(name, line) for name, line in list_names(tree) if any(is_inside(name, other) for other in UNPICKLERS)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "load"):
            values = {keyword.arg: keyword.value for keyword in node.keywords}
            if ast.unparse(values.get("weights_only", ast.Constant(None))) != "True":
                found.append(("torch.load without weights_only=True", node.lineno))
    return found


def test_no_unsafe_call():
    found = {}
    for path in list_python_files("megatron_metro", "tools", "examples", "tests"):
        allowed = ALLOWED.get(relative(path), ())
        uses = [f"{name} (line {line})" for name, line in find_unsafe(parse(path)) if name not in allowed]
        if uses:
            found[relative(path)] = uses
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import _pickle as p",
        "eval(text)",
        "exec(text)",
        "import os\nos.system('ls')",
        "from os import system\nsystem('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.UnsafeLoader)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import torch\ntorch.load(path, weights_only=False)",
        "archive.extractall(path)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_an_unsafe_call_is_found(source):
    assert find_unsafe(ast.parse(source))


def test_the_library_unpickles_nothing():
    files = list_python_files("megatron_metro", "tools", "examples")
    found = {relative(path): uses for path in files if (uses := find_unpickling(parse(path)))}
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=safe)",
        "from torch import load\nload(path)",
        "from megatron.core import dist_checkpointing\ndist_checkpointing.load(state, path)",
        "from megatron.core.dist_checkpointing import load_plain_tensors",
        "from torch.distributed.checkpoint import FileSystemReader",
        "import torch.distributed.checkpoint as dcp\ndcp.load(state)",
        "from torch.serialization import add_safe_globals",
        "import shutil\nshutil.unpack_archive(path)",
    ],
)
def test_unpickling_is_found(source):
    assert find_unpickling(ast.parse(source))


def test_safe_calls_pass():
    source = "import yaml, re\nmodel.eval()\nyaml.safe_load(text)\nre.compile('a')\ntorch.load(path, weights_only=True)"
    assert find_unsafe(ast.parse(source)) == [] and find_unpickling(ast.parse(source)) == []
