"""Nothing that a checkpoint holds is ever run: hostile files against every loader and tool, under hostile settings."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_metro.checkpoint.manifest import MANIFEST
from megatron_metro.checkpoint.reader import open_step
from megatron_metro.config.errors import MetroError
from megatron_metro.conversion.whole_model import load_model
from megatron_metro.tokenizer import NullTokenizer
from tests.helpers import hostile
from tests.helpers.repository import ROOT
from tests.helpers.stored_run import RUN, STEP, StoredRun, save_run, sign

LOADERS = ("training", "load_model", "verify", "inspect")
HOSTILE_SETTINGS = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "PYTHONOPTIMIZE": "1"}
NAMES = [case.name for case in hostile.list_hostile_files("true")]


@pytest.fixture(scope="module")
def stored(device, tmp_path_factory) -> StoredRun:
    from megatron_metro.parallel.groups import single_process

    return save_run(tmp_path_factory.mktemp("stored") / "run", single_process(device))


def read_all(step: Path) -> None:
    reader = open_step(step, verify=False)
    for name in reader.names():
        reader.read(name)


def run_tool(command: str, folder: Path) -> None:
    """The tool in this process; what it would print on standard error is raised."""
    argv, sys.argv = sys.argv, ["convert_checkpoint.py", command, str(folder)]
    try:
        runpy.run_path(str(ROOT / "tools" / "convert_checkpoint.py"), run_name="__main__")
    finally:
        sys.argv = argv


def attempt(loader: str, stored: StoredRun, folder: Path, capsys) -> tuple[int, str]:
    """Exit code and message of a loader."""
    tokenizer = NullTokenizer(RUN.model.vocab_size, 8)
    actions: dict[str, Callable[[], object]] = {
        "reader": lambda: read_all(folder / STEP),
        "training": lambda: stored.load(folder),
        "load_model": lambda: load_model(folder, tokenizer=tokenizer, device="cpu"),
        "verify": lambda: run_tool("verify", folder),
        "inspect": lambda: run_tool("inspect", folder),
    }
    try:
        actions[loader]()
    except MetroError as error:
        return error.exit_code, str(error)
    except SystemExit as ended:
        return int(ended.code or 0), capsys.readouterr().err
    return 0, ""


@pytest.fixture
def canary(tmp_path) -> Path:
    return tmp_path / "canary"


def check_refused(case: hostile.HostileFile, loader: str, found: tuple[int, str]) -> None:
    code, message = found
    # verify reads no numbers, so it has nothing to say of a shard whose hash is right
    expected = (0,) if loader == "verify" and case.name.startswith("shard: ") else (case.code,)
    assert code in expected, f"{case.name}: {loader} ended with {code}: {message}"
    if code == 77:
        assert case.words in message and STEP in message and "\n" not in message.strip()
    if code:
        assert message.isascii() and "\x1b" not in message and len(message) < 1500


def try_case(case: hostile.HostileFile, loaders: tuple[str, ...], stored: StoredRun, tmp_path: Path, capsys) -> int:
    folder = stored.copy(tmp_path / "run")
    case.poison(folder / STEP)
    if "is a" not in case.name:  # no manifest can vouch for links and pipes
        sign(folder / STEP)  # who writes a file can write its manifest
    before = stored.weights() if case.code else {}
    for loader in loaders:
        check_refused(case, loader, attempt(loader, stored, folder, capsys))
    for name, weight in stored.weights().items() if before and not case.name.startswith("shard: ") else ():
        assert torch.equal(weight, before[name]), f"{case.name}: {name} was changed"
    return len(loaders)


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_a_hostile_file_runs_nothing(number, stored, tmp_path, canary, capsys):
    case = hostile.list_hostile_files(f"touch {canary}")[number]
    try_case(case, ("reader", LOADERS[number % len(LOADERS)]), stored, tmp_path, capsys)
    assert not canary.exists(), f"{case.name} was run"


@pytest.mark.full
def test_every_hostile_file_against_every_loader(stored, tmp_path, canary, capsys, record_property):
    count = 0
    for number, case in enumerate(hostile.list_hostile_files(f"touch {canary}")):
        (tmp_path / str(number)).mkdir()
        count += try_case(case, ("reader", *LOADERS), stored, tmp_path / str(number), capsys)
        assert not canary.exists(), f"{case.name} was run"
    record_property("hostile checkpoint files", len(NAMES))
    record_property("attempts to load one", count)
    record_property("executions", 0)


@pytest.mark.full
def test_hostile_settings_change_nothing():
    """The same with weights-only loading switched off by the environment, and with asserts compiled away."""
    path = str(Path(__file__).relative_to(ROOT))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path, "-k", "runs_nothing"]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **HOSTILE_SETTINGS}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert f"{len(NAMES)} passed" in result.stdout


def test_the_environment_cannot_make_the_reader_unsafe(stored, tmp_path, canary, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    cases = hostile.list_hostile_files(f"touch {canary}")
    chosen = [case for case in cases if case.code == 77 and case.name.startswith(("shard", "metadata: protocol"))]
    for number, case in enumerate(chosen):
        (tmp_path / str(number)).mkdir()
        try_case(case, ("reader",), stored, tmp_path / str(number), capsys)
    assert len(chosen) >= 10 and not canary.exists()


def test_the_payloads_are_dangerous(tmp_path):
    """Python's own unpickler runs each of them: the tests above would see it."""
    kinds = hostile.payloads("echo >> canary")
    for number, (content, _) in enumerate(kinds.values()):
        (tmp_path / str(number)).write_bytes(content)
    script = (
        "import pickle\nfor number in range(int(__import__('sys').argv[1])):\n"
        "    try: pickle.load(open(str(number), 'rb'))\n    except Exception as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, str(len(kinds))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (tmp_path / "canary").read_text().count("\n") == len(kinds), done.stdout


@pytest.mark.parametrize("loader", LOADERS)
def test_false_documents_are_refused(loader, stored, tmp_path, capsys):
    step = stored.copy(tmp_path / "run") / STEP
    read_document, write = _document_access(step)
    for name, content in hostile.hostile_documents(read_document).items():
        write(content)
        code, message = attempt(loader, stored, tmp_path / "run", capsys)
        ignores_configuration = loader != "load_model" and code == 0
        assert code == 66 or ignores_configuration, f"{name}: {code} {message}"


def _document_access(step: Path):
    from megatron_metro.checkpoint.folder import read_document
    from megatron_metro.checkpoint.manifest import write_manifest

    def write(content: bytes) -> None:
        (step / MANIFEST).unlink()
        try:
            document = json.loads(content)
            write_manifest(step, {name: value for name, value in document.items() if name not in ("files", "sha256")})
        except (ValueError, AttributeError, RecursionError):
            (step / MANIFEST).write_bytes(content)

    return read_document(step), write


@pytest.mark.parametrize("text", ["", "-3", "3.0", "3\0", "\u0663", "1" * 5000, "3;touch x", "../3", "\x1b[2J"])
def test_a_false_tracker_is_refused(text, stored, tmp_path, capsys):
    folder = stored.copy(tmp_path / "run")
    (folder / "latest_checkpointed_iteration.txt").write_text(text)
    for loader in ("training", "load_model"):
        code, message = attempt(loader, stored, folder, capsys)
        assert code in (0, 66) and "\x1b" not in message, message


def test_nothing_but_tensors_is_saved(stored):
    """No sharded object and no pickle of ours: the only pickles are torch's words about tensors, and an empty one."""
    names = {path.name for path in stored.step.iterdir()}
    assert {name for name in names if name.endswith((".pt", ".pkl"))} <= {"common.pt"}
    if "common.pt" in names:
        assert torch.load(stored.step / "common.pt", weights_only=True) == {}
    reader = open_step(stored.step)
    assert len(reader.names()) > 3 * len(reader.weight_names())
