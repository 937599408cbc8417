"""Size budgets. Ruff holds those of complexity and parameters."""

import ast

from tests.helpers.repository import PACKAGE, list_python_files, parse, relative

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_TOOL_LINES = 60
MAX_LIBRARY_LINES = 23_000
CODE_FOLDERS = ("megatron_metro", "tools", "examples", "tests")


def count_lines(path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def find_long_functions(tree: ast.Module, limit: int) -> list[tuple[str, int]]:
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [(f.name, f.end_lineno - f.lineno + 1) for f in functions]
    return [(name, length) for name, length in lengths if length > limit]


def test_files_are_short():
    lengths = {relative(p): count_lines(p) for p in list_python_files(*CODE_FOLDERS)}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_are_short():
    files = {relative(p): find_long_functions(parse(p), MAX_FUNCTION_LINES) for p in list_python_files(*CODE_FOLDERS)}
    assert {name: found for name, found in files.items() if found} == {}


def test_tools_are_thin():
    lengths = {relative(p): count_lines(p) for p in list_python_files("tools")}
    assert {name: length for name, length in lengths.items() if length >= MAX_TOOL_LINES} == {}


def test_library_is_small():
    assert sum(count_lines(p) for p in list_python_files("megatron_metro")) < MAX_LIBRARY_LINES


def test_init_files_hold_a_docstring_and_nothing_else():
    files = [p for p in list_python_files("megatron_metro") if p.name == "__init__.py"]
    packages = {p for p in PACKAGE.rglob("*") if p.is_dir() and p.name != "__pycache__"} | {PACKAGE}
    assert {p.parent for p in files} == packages
    full = [relative(p) for p in files if len(parse(p).body) != 1 or ast.get_docstring(parse(p)) is None]
    assert full == []


def test_a_long_function_is_found():
    body = "\n".join("    x = 1" for _ in range(5))
    assert find_long_functions(ast.parse(f"def short(): pass\ndef long():\n{body}\n"), 5) == [("long", 6)]
