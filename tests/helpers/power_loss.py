"""What a disk may hold after a loss of power: a model of ordered, reordered and dropped writes.

Changes of a folder's names last once the folder is synchronised, contents of a file once the file is. Until then any
subset of the changes may have reached the disk, and any beginning of the contents. (The model of the ALICE and
CrashMonkey papers, for one process.)
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MAX_EXHAUSTIVE = 6  # pending changes of which all subsets are tried


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One recorded operation. `content` is that of a file when it was synchronised."""

    name: str
    paths: tuple[str, ...]  # relative to the recorded folder
    content: bytes | None = None


@dataclass(eq=False, slots=True)
class _Node:
    """A file, or a folder with its names. Nodes are compared by identity, as inodes are."""

    is_folder: bool
    names: dict[str, _Node] = field(default_factory=dict)  # as the process sees them
    final: bytes = b""  # all that is written to it, known once it is synchronised
    is_durable: bool = False


@dataclass(frozen=True, slots=True)
class _Change:
    """Names that come and go together in one or two folders."""

    gone: tuple[tuple[_Node, str], ...] = ()
    come: tuple[tuple[_Node, str, _Node], ...] = ()

    @property
    def folders(self) -> set[_Node]:
        return {folder for folder, _ in self.gone} | {folder for folder, _, _ in self.come}


class Disk:
    """Replays operations; `crash_states` lists what may be found if the power goes now."""

    def __init__(self) -> None:
        self._root = _Node(is_folder=True, is_durable=True)
        self._pending: list[_Change] = []
        self._durable: list[_Change] = []

    def replay(self, operation: Operation) -> None:
        """The operation has been done."""
        handle = {
            "mkdir": self._make_folder,
            "open": self._make_file,
            "rename": self._rename,
            "remove": self._remove,
            "rmdir": self._remove,
            "fsync": self._synchronise,
        }.get(operation.name)
        if handle is not None:
            handle(operation)

    def crash_states(self, generator: random.Random, num_random: int) -> Iterator[dict[str, bytes | None]]:
        """Trees as path -> contents (None: a folder): none, all, all but one, each alone, and random subsets."""
        n = len(self._pending)
        subsets: set[tuple[bool, ...]]
        if n <= MAX_EXHAUSTIVE:
            subsets = set(itertools.product((False, True), repeat=n))
        else:
            subsets = {(False,) * n, (True,) * n}
            subsets |= {tuple(i == j for j in range(n)) for i in range(n)}
            subsets |= {tuple(i != j for j in range(n)) for i in range(n)}
            subsets |= {tuple(j < i for j in range(n)) for i in range(n)}
            subsets |= {tuple(generator.random() < 0.5 for _ in range(n)) for _ in range(num_random)}
        for subset in sorted(subsets):
            for share in (0.0, 1.0, generator.random()):
                yield self._materialise([*self._durable, *itertools.compress(self._pending, subset)], share)

    def _make_folder(self, operation: Operation) -> None:
        if operation.paths[0] != ".":  # the recorded folder itself, which is there
            self._add(operation.paths[0], _Node(is_folder=True))

    def _make_file(self, operation: Operation) -> None:
        folder, name = self._find(operation.paths[0])
        if name not in folder.names:
            self._add(operation.paths[0], _Node(is_folder=False))

    def _add(self, path: str, node: _Node) -> None:
        folder, name = self._find(path)
        folder.names[name] = node
        self._pending.append(_Change(come=((folder, name, node),)))

    def _rename(self, operation: Operation) -> None:
        (old_folder, old), (new_folder, new) = map(self._find, operation.paths)
        node = old_folder.names.pop(old)
        new_folder.names[new] = node
        self._pending.append(_Change(gone=((old_folder, old),), come=((new_folder, new, node),)))

    def _remove(self, operation: Operation) -> None:
        folder, name = self._find(operation.paths[0])
        if folder.names.pop(name, None) is None:
            return  # it was renamed before, and the removal fails
        self._pending.append(_Change(gone=((folder, name),)))

    def _synchronise(self, operation: Operation) -> None:
        if operation.paths[0] == ".":
            node = self._root
        else:
            folder, name = self._find(operation.paths[0])
            node = folder.names[name]
        if not node.is_folder:
            assert operation.content is not None
            node.final, node.is_durable = operation.content, True
            return
        self._durable += [change for change in self._pending if node in change.folders]
        self._pending = [change for change in self._pending if node not in change.folders]

    def learn_contents(self, operations: Sequence[Operation]) -> None:
        """What files that are open at the moment of the crash will have been told to hold: `operations` lie ahead."""
        for operation in operations:
            if operation.name == "fsync" and operation.content is not None:
                folder, name = self._find_or_none(operation.paths[0])
                if folder is not None and name in folder.names and not folder.names[name].is_durable:
                    folder.names[name].final = operation.content

    def _find(self, path: str) -> tuple[_Node, str]:
        folder, name = self._find_or_none(path)
        assert folder is not None, path
        return folder, name

    def _find_or_none(self, path: str) -> tuple[_Node | None, str]:
        *parents, name = Path(path).parts
        folder: _Node | None = self._root
        for parent in parents:
            folder = folder.names.get(parent) if folder is not None else None
        return folder, name

    def _materialise(self, changes: Sequence[_Change], share: float) -> dict[str, bytes | None]:
        names: dict[_Node, dict[str, _Node]] = {}
        for change in changes:
            if any(name not in names.get(folder, {}) for folder, name in change.gone):
                continue  # what it moves or removes never reached the disk
            for folder, name in change.gone:
                del names[folder][name]
            for folder, name, node in change.come:
                names.setdefault(folder, {})[name] = node
        tree: dict[str, bytes | None] = {}

        def visit(folder: _Node, prefix: str) -> None:
            for name, node in names.get(folder, {}).items():
                tree[prefix + name] = None
                if node.is_folder:
                    visit(node, f"{prefix}{name}/")
                else:
                    tree[prefix + name] = node.final if node.is_durable else node.final[: int(share * len(node.final))]

        visit(self._root, "")
        return tree


def build_tree(tree: dict[str, bytes | None], folder: Path) -> None:
    """Make the files and folders of a crash state."""
    folder.mkdir()
    for path, content in tree.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
