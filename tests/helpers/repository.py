"""What the guards read: the files of this repository, and the names a Python file uses."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_metro"

# Folders that .gitignore leaves out of the repository.
IGNORED_FOLDERS = {"__pycache__", "runs", "build", "dist"}


def list_files(*folders: str) -> list[Path]:
    """All files of these top-level folders (of the repository when none is named); of hidden folders only .ci's."""

    def walk(folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            if path.is_file():
                if path.name != ".git":  # in a further work tree it is a file
                    yield path
            elif path.name == ".ci" or not (
                path.name.startswith(".") or path.name in IGNORED_FOLDERS or path.name.endswith(".egg-info")
            ):
                yield from walk(path)

    return [path for folder in (folders or ("",)) for path in walk(ROOT / folder)]


def list_python_files(*folders: str) -> list[Path]:
    """All Python files of these top-level folders."""
    return [path for path in list_files(*folders) if path.suffix == ".py"]


def relative(path: Path) -> str:
    """Path inside the repository, with forward slashes."""
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    """Syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _dotted(node: ast.expr) -> str | None:
    """`a.b.c` as text; None for anything that is not a chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return None if owner is None else f"{owner}.{node.attr}"
    return None


def list_names(tree: ast.Module) -> list[tuple[str, int]]:
    """Every imported name and dotted use, in full (`dist.send` is `torch.distributed.send`), with its line."""
    names: list[tuple[str, int]] = []
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names.append((alias.name, node.lineno))
                if alias.asname:
                    aliases[alias.asname] = alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names.append((f"{node.module}.{alias.name}", node.lineno))
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            text = _dotted(node)
            if text is not None:
                head, dot, rest = text.partition(".")
                names.append((aliases.get(head, head) + dot + rest, node.lineno))
    return names


def is_inside(name: str, module: str) -> bool:
    """Whether a dotted name is the module or something in it."""
    return name == module or name.startswith(module + ".")
