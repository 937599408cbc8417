"""Built arrays kept on disk: raw little-endian bytes behind a header and a checksum, never pickled.

Any number of processes may build the same entry at once: each publishes a whole file, and all files are equal.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_metro.config.files import write_atomically

MAGIC = b"METRO-ARRAYS 1\n"
DIGEST_BYTES = 32
KINDS = ("<i4", "<i8")

Arrays = dict[str, NDArray]


def load_or_build(folder: str | None, key: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays of `key`: read from the cache folder, or built and put there; damaged entries are built again.

    Without a folder they are built every time. `key` must name everything the arrays depend on.
    """
    if folder is None:
        return build()
    path = Path(folder) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.arrays"
    arrays = _read(path, key)
    if arrays is None:
        arrays = build()
        write_atomically(path, _pack(key, arrays))
    return arrays


def _pack(key: str, arrays: Arrays) -> bytes:
    kinds = {name: array.dtype.newbyteorder("<").str for name, array in arrays.items()}
    assert set(kinds.values()) <= set(KINDS), kinds
    header = {"key": key, "arrays": [[name, kinds[name], len(array)] for name, array in arrays.items()]}
    parts = [json.dumps(header).encode() + b"\n"]
    parts += [array.astype(kinds[name], copy=False).tobytes() for name, array in arrays.items()]
    content = b"".join(parts)
    return MAGIC + hashlib.sha256(content).digest() + content


def _read(path: Path, key: str) -> Arrays | None:
    """The arrays in a file; None when it is missing, damaged or of another key."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    content = memoryview(stored)[len(MAGIC) + DIGEST_BYTES :]
    if not stored.startswith(MAGIC) or hashlib.sha256(content).digest() != stored[len(MAGIC) :][:DIGEST_BYTES]:
        return None
    end = stored.index(b"\n", len(MAGIC) + DIGEST_BYTES) + 1
    header = json.loads(stored[len(MAGIC) + DIGEST_BYTES : end])
    if header["key"] != key:
        return None
    arrays: Arrays = {}
    for name, kind, length in header["arrays"]:
        arrays[name] = np.frombuffer(stored, kind, length, end)
        end += arrays[name].nbytes
    return arrays
