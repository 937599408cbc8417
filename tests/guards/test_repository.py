"""The repository is what the README says it is, and holds nothing of the machine it was written on."""

import re
from pathlib import Path

import pytest

from tests.helpers.layouts import matrix
from tests.helpers.repository import PACKAGE, ROOT, list_files, list_python_files, parse, relative

TOP_LEVEL = {
    "megatron_metro", "tools", "examples", "tests", "setup.py", "README.md", "CONTRIBUTING.md", "LICENSE", "Dockerfile",
}  # fmt: skip
TOOLS = {
    "train_tokenizer", "clean_corpus", "preprocess_data", "merge_datasets", "inspect_data", "pretrain", "finetune",
    "evaluate", "generate", "convert_checkpoint", "plan", "benchmark", "plot_run", "doctor",
}  # fmt: skip

# Folders of one machine, and hosts of package indices: those are the user's to choose (PIP_INDEX_URL, TORCH_INDEX_URL).
FOREIGN = re.compile(r"(?<![\w.])/(work|root|home/\w+|Users/\w+)/|\bpypi\.org|pythonhosted\.org|download\.pytorch\.org")


def list_tree_entries(readme: str) -> dict[str, str]:
    """Path -> description of the README's annotated tree: two blanks of indentation a level, folders end in a slash."""
    block = re.search(r"^## Repository\n.*?```text\n(.*?)```", readme, re.MULTILINE | re.DOTALL)
    assert block, "README.md has no ```text block under '## Repository'"
    entries: dict[str, str] = {}
    parents: list[str] = []
    for line in block[1].splitlines():
        level = (len(line) - len(line.lstrip())) // 2
        name, _, description = line.strip().partition("  ")
        parents[level:] = [name]
        entries["".join(parents)] = description.strip()
    return entries


def list_expected_entries() -> set[str]:
    """All modules of the library, tools, examples, and the folders and scripts of the tests."""
    library = {relative(p) for p in list_python_files("megatron_metro") if p.name != "__init__.py"}
    packages = {relative(p.parent) + "/" for p in list_python_files("megatron_metro")}
    entry_points = {relative(p) for p in list_files("tools", "examples")}
    tests = {f"tests/{p.name}" for p in (ROOT / "tests").iterdir() if p.suffix == ".sh"}
    test_folders = {
        "/".join(relative(p).split("/")[:2]) + "/" for p in list_python_files("tests") if p.parts[-2] != "tests"
    }
    return library | packages | entry_points | tests | test_folders | {"tools/", "examples/", "tests/"}


def test_readme_tree_is_true():
    entries = list_tree_entries((ROOT / "README.md").read_text(encoding="utf-8"))
    expected = list_expected_entries()
    missing = sorted(expected - set(entries))
    stale = sorted(entry for entry in entries if not (ROOT / entry).exists())
    assert (missing, stale) == ([], []), "the tree in README.md lacks the first and has the second for nothing"
    assert [entry for entry, description in entries.items() if not description] == []


def test_top_level_is_fixed():
    names = {relative(path).split("/")[0] for path in list_files()}
    assert sorted(name for name in names - TOP_LEVEL if not name.startswith(".")) == []


def test_tools_are_the_known_ones():
    assert sorted(p.stem for p in list_python_files("tools") if p.stem not in TOOLS) == []


@pytest.mark.parametrize("name", ["utils", "util", "common", "helpers", "misc"])
def test_no_module_without_a_subject(name):
    assert [relative(p) for p in PACKAGE.rglob("*") if p.stem == name] == []


def test_names_are_kept_off_the_standard_library():
    assert [relative(p) for p in PACKAGE.rglob("*.py") if p.stem in {"platform", "logging", "types", "random"}] == []


def find_foreign(path: Path) -> list[str]:
    """Lines that name a machine's folder or an index host."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [f"{relative(path)}:{i}: {line.strip()}" for i, line in enumerate(lines, 1) if FOREIGN.search(line)]


def test_no_machine_paths_and_no_index_hosts():
    binary = {".png", ".gz", ".zst", ".bin", ".idx", ".model"}
    files = [p for p in list_files() if p.suffix not in binary and p != Path(__file__)]
    assert [found for path in files for found in find_foreign(path)] == []


def test_foreign_lines_are_found():
    assert FOREIGN.search("cd /" + "work/main") and FOREIGN.search("https://pypi.org/simple")
    assert not FOREIGN.search("at /work of the model") and not FOREIGN.search("src/home/x/y")


def test_modules_say_what_they_are_for():
    silent = [relative(p) for p in list_python_files("megatron_metro", "tools", "examples") if not has_docstring(p)]
    assert silent == []


def has_docstring(path: Path) -> bool:
    body = parse(path).body
    return bool(body) and hasattr(body[0], "value") and isinstance(getattr(body[0].value, "value", None), str)


def test_readme_counts_the_rows_of_the_parity_matrix():
    num_rows = sum(map(len, matrix().values()))
    assert f" It has {num_rows:,} rows " in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
