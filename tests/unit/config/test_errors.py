"""Errors end a tool with one line and their exit code; configuration loads no framework."""

import subprocess
import sys

import pytest

from megatron_metro.config.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MetroError,
    NumericError,
    OutOfMemoryError,
    PeerError,
    StoppedError,
    StorageError,
    UnsafeError,
    exit_on_error,
)

EXIT_CODES = {
    ConfigError: 64,
    DataError: 65,
    CheckpointError: 66,
    OutOfMemoryError: 71,
    StorageError: 74,
    StoppedError: 75,
    NumericError: 76,
    UnsafeError: 77,
    PeerError: 78,
    MetroError: 70,
}


@pytest.mark.parametrize("error", EXIT_CODES)
def test_an_error_becomes_one_line_and_an_exit_code(error, capsys):
    with pytest.raises(SystemExit) as stop, exit_on_error():
        raise error("first\nsecond")
    assert stop.value.code == EXIT_CODES[error]
    assert capsys.readouterr().err == "error: first second\n"


def test_any_other_error_shows_where_it_is_and_has_its_own_exit_code(capsys):
    with pytest.raises(SystemExit) as stop, exit_on_error():
        raise KeyError("x")
    assert stop.value.code == 70
    assert capsys.readouterr().err.endswith("KeyError: 'x'\n")


def test_an_interrupt_is_one_line_too(capsys):
    with pytest.raises(SystemExit) as stop, exit_on_error():
        raise KeyboardInterrupt
    assert (stop.value.code, capsys.readouterr().err) == (130, "error: interrupted\n")


def test_a_reader_that_has_gone_gets_no_complaint():
    code = (
        "from megatron_metro.config.errors import exit_on_error\n"
        "with exit_on_error():\n"
        "    for _ in range(10**6): print('line')"
    )
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command.stdout.readline()
    command.stdout.close()
    assert (command.stderr.read(), command.wait(timeout=60)) == (b"", 141)


def test_no_framework_is_loaded():
    code = (
        "import pkgutil, sys, importlib, megatron_metro.config as config\n"
        "for module in pkgutil.iter_modules(config.__path__, 'megatron_metro.config.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(sorted({'torch', 'numpy', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
