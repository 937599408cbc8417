"""Files that exist whole or not at all: written under a temporary name, synchronised, renamed."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_metro.config.errors import StorageError


@contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """A fresh empty file beside `path`, removed at the end unless it has been renamed; its folder is made.

    Raises StorageError, naming the file and the cause, when the file system refuses.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        # mkstemp makes private files; what is published gets the permissions an ordinary write would give.
        temporary.chmod(0o666 & ~current_umask())
        yield temporary
    except StorageError:
        raise
    except OSError as error:
        cause = error.strerror or error
        raise StorageError(f"cannot write {path}: {cause}; free space or choose another folder") from error
    finally:
        if temporary is not None:
            with suppress(FileNotFoundError):
                temporary.unlink()


def publish(temporary: Path, path: Path) -> None:
    """Give a finished temporary file or folder its final name; both survive a loss of power from then on."""
    synchronise(temporary)
    temporary.replace(path)
    synchronise(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file, or leave what was there."""
    with temporary_sibling(path) as temporary:
        temporary.write_bytes(content)
        publish(temporary, path)


@contextmanager
def refusing_writes(path: Path) -> Iterator[None]:
    """Make a StorageError, naming the file and the cause, of what a file system that refuses a write raises."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; free space there") from error


def check_writable(folder: Path, flag: str) -> None:
    """Raise StorageError, naming the flag, unless files can be made in a folder, which is made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StorageError(
            f"{flag} {folder}: cannot be written ({error.strerror}); choose a folder that can"
        ) from error


def synchronise(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def current_umask() -> int:
    """The mode bits that new files lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
