"""The manifest of a step: size and SHA-256 of every file of it, beside what the run was. Files only.

`manifest.json` is written last and vouches for all other files; it vouches for itself by a digest of its own text,
which has one legal form (sorted keys, fixed indentation), so no byte of a step can change unnoticed. A digest is no
signature: who can write the folder can write a manifest as well.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_metro.config import files
from megatron_metro.config.errors import CheckpointError, first_line

MANIFEST = "manifest.json"
_FILES, _DIGEST = "files", "sha256"
_BLOCK_BYTES = 1 << 20
_MAX_MANIFEST_BYTES = 1 << 28  # a hundred times that of ten thousand ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """What the manifest says of a file."""

    size: int  # bytes
    sha256: str  # 64 hexadecimal digits


def hash_file(path: Path) -> FileRecord:
    """Read a whole file. Raises OSError, also for what is no regular file."""
    digest, size, block = hashlib.sha256(), 0, memoryview(bytearray(_BLOCK_BYTES))
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path}: is no regular file")
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
    return FileRecord(size=size, sha256=digest.hexdigest())


def write_manifest(folder: Path, document: Mapping[str, Any], known: Mapping[str, FileRecord] | None = None) -> None:
    """Make all files of a step durable and vouch for them; nothing may be written into the folder afterwards.

    Their names are durable once the folder is synchronised, which `files.publish` does.

    `document` says what the run was, as JSON. `known` holds files that were synchronised and hashed as they were
    written; all others are synchronised and hashed here. Raises OSError when the file system refuses, or lacks a known
    file.
    """
    known = known or {}
    names = {entry.name for entry in os.scandir(folder)}
    if lost := sorted(known.keys() - names):
        raise OSError(f"{folder / lost[0]}: was written and is gone")
    records = dict(known)
    for name in sorted(names - known.keys()):
        files.synchronise(folder / name)
        records[name] = hash_file(folder / name)
    described = {**document, _FILES: {name: asdict(record) for name, record in records.items()}}
    described = json.loads(json.dumps(described))  # as it will be read: no tuples, keys are text
    content = _format({**described, _DIGEST: _digest(described)})
    with open(folder / MANIFEST, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The document of a step, with `files`; the manifest itself is whole, other files are not looked at.

    Raises CheckpointError.
    """
    path = folder / MANIFEST
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path}: is no regular file, or larger than any manifest; choose another step")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: holds no {MANIFEST}, so nothing vouches for its files; choose another step"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({first_line(error)}); choose another step") from error
    try:
        document: dict[str, Any] = json.loads(content)
        unsigned = {key: value for key, value in document.items() if key != _DIGEST}
        is_whole = content == _format(document) and document[_DIGEST] == _digest(unsigned)
        records = {name: FileRecord(**record) for name, record in document[_FILES].items()} if is_whole else {}
        is_whole = is_whole and all(type(r.size) is int and type(r.sha256) is str for r in records.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise CheckpointError(f"{path}: is damaged, its own digest does not fit; choose another step")
    return document


def list_files(folder: Path) -> dict[str, FileRecord]:
    """The files that a whole step consists of; each is there with its size, and no other is. Reads no contents.

    Raises CheckpointError, naming the file.
    """
    records = {name: FileRecord(**record) for name, record in read_manifest(folder)[_FILES].items()}
    try:
        found = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({first_line(error)}); choose another step") from error
    del found[MANIFEST]
    if missing := sorted(records.keys() - found.keys()):
        raise CheckpointError(f"{folder / missing[0]}: is missing ({len(missing)} such files); choose another step")
    if extra := sorted(found.keys() - records.keys()):
        raise CheckpointError(f"{folder / extra[0]}: is not in {MANIFEST} ({len(extra)} such files); remove it")
    for name, record in records.items():
        if not stat.S_ISREG(found[name].st_mode):
            raise CheckpointError(f"{folder / name}: is no regular file; choose another step")
        if found[name].st_size != record.size:
            raise CheckpointError(
                f"{folder / name}: has {found[name].st_size} bytes, {MANIFEST} says {record.size}; choose another step"
            )
    return records


def verify_contents(folder: Path, names: Iterable[str], records: Mapping[str, FileRecord]) -> None:
    """Read the named files of a step and compare their hashes. Raises CheckpointError, naming the file."""
    for name in names:
        try:
            found = hash_file(folder / name)
        except OSError as error:
            raise CheckpointError(
                f"{folder / name}: cannot be read ({first_line(error)}); choose another step"
            ) from error
        if found != records[name]:
            raise CheckpointError(
                f"{folder / name}: is damaged, its SHA-256 is {found.sha256[:12]}..., {MANIFEST} says "
                f"{records[name].sha256[:12]}...; choose another step"
            )


def verify_step(folder: Path) -> None:
    """Check every byte of a step. Raises CheckpointError naming the file that is missing, extra, resized or changed."""
    records = list_files(folder)
    verify_contents(folder, records, records)


def _format(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(_format(document)).hexdigest()
