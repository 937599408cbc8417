"""Every change that this process makes below a folder, told before it happens.

Python's audit hooks see calls, whoever makes them; they do not see fsync, whose function is replaced. Hooks stay for
the life of a process, so `watch` is for forked children.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Event -> positions of the path and of the folder's descriptor it may be relative to.
_CHANGES = {
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.chmod": ((0, 2),),
    "os.truncate": ((0, None),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
}


def watch(folder: Path, tell: Callable[[str, list[Path]], None]) -> None:
    """Call `tell(operation, paths)` before each of this process's changes below a folder, for the rest of its life.

    Nothing is synchronised any more: a killed process loses no write, and disks are slow.
    """
    root = os.path.realpath(folder)

    def is_inside(path: Path) -> bool:
        return str(path) == root or str(path).startswith(root + os.sep)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & _WRITES:
            operation, paths = "open", [Path(os.path.realpath(os.fsdecode(arguments[0])))]
        elif event in _CHANGES:
            operation = event.removeprefix("os.")
            paths = [_resolve(arguments, *places) for places in _CHANGES[event]]
        else:
            return
        if any(map(is_inside, paths)):
            tell(operation, paths)

    def synchronise(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if is_inside(path):
            tell("fsync", [path])

    os.fsync = synchronise
    sys.addaudithook(hook)


def kill_at(folder: Path, index: int, kill: Callable[[], None], *, in_child_of: int | None = None) -> Callable[[], int]:
    """Call `kill` before this process's `index`-th change below a folder (from 0); a function that counts them.

    With `in_child_of` a process id, only what children do that it forks later counts.
    """
    count = 0

    def tell(_operation: str, _paths: list[Path]) -> None:
        nonlocal count
        if os.getpid() == in_child_of:
            return
        if count == index:
            kill()
        count += 1

    watch(folder, tell)
    return lambda: count


def kill_self() -> None:
    """What the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def _resolve(arguments: tuple[Any, ...], path_at: int, folder_at: int | None) -> Path:
    path = os.fsdecode(arguments[path_at])
    folder = arguments[folder_at] if folder_at is not None else -1
    if isinstance(folder, int) and folder >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    # The last part is not followed: it is the name that changes.
    return Path(os.path.realpath(os.path.dirname(os.path.abspath(path)))) / os.path.basename(path)
