"""Raw text in, documents out: JSON lines and plain text, plain or compressed, read in chunks of whole lines.

Chunks do not depend on who reads them, so any number of workers makes the same documents.
"""

import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from megatron_metro.config.errors import DataError

CHUNK_BYTES = 2**20
MAX_LINE_BYTES = 2**28
TEXT_DOCUMENT_CHARACTERS = 2000  # paragraphs of plain text are joined to documents of at least so many characters
TEXT_SUFFIXES = (".txt", ".md", ".rst")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
KNOWN_SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES
COMPRESSED_SUFFIXES = (".gz", ".zst")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Some whole lines of one file."""

    path: str
    first_line: int  # counted from 1
    content: bytes
    is_json: bool
    read_bytes: int  # of the file as it lies on disk


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document, as one text per key."""

    place: str  # file:line
    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class BadLine:
    """A line that gives no document, and why."""

    place: str
    cause: str


def find_inputs(inputs: Sequence[str]) -> list[Path]:
    """Files named one by one, by folder (recursively) or by pattern, in a fixed order."""
    found: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            matches = sorted(
                file for file in path.rglob("*") if file.is_file() and _bare_suffix(file) in KNOWN_SUFFIXES
            )
        elif path.is_file():
            matches = [path]
        else:
            matches = sorted(Path(match) for match in glob.glob(name, recursive=True) if Path(match).is_file())
        if not matches:
            raise DataError(f"--input {name} names no file with text; give a file, a folder or a pattern")
        found += matches
    return found


def read_chunks(paths: Iterable[Path]) -> Iterator[Chunk]:
    """All lines of all files, about a mebibyte at a time; DataError when a file cannot be read or unpacked."""
    for path in paths:
        is_json = _bare_suffix(path) not in TEXT_SUFFIXES
        try:
            with path.open("rb") as raw, closing(_unpack(raw, path)) as stream:
                yield from _cut_chunks(path, raw, stream, is_json)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise DataError(f"{path} cannot be read: {error or type(error).__name__}") from error


def parse_chunk(chunk: Chunk, keys: Sequence[str], hint: str = "see --json-keys") -> Iterator[Document | BadLine]:
    """The documents of a chunk; blank lines are passed over. `hint` follows what is said of a key that is missing."""
    return _parse_json(chunk, keys, hint) if chunk.is_json else _parse_text(chunk, keys)


def _bare_suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _unpack(raw: BinaryIO, path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if suffix == ".zst":
        return cast(BinaryIO, _ZstdStream(raw))
    return raw


class _ZstdStream:
    """The unpacked bytes of all frames of a file; zstandard's own reader takes a cut frame for a whole one."""

    _READ_BYTES = 2**13  # of the packed file at once: what unpacks to very much more stays within memory

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: Any = None  # the frame that has begun and not ended
        self._packed, self._unpacked = b"", bytearray()

    def read(self, size: int) -> bytes:
        """So many bytes, fewer only at the end; EOFError where the file ends within a frame."""
        while len(self._unpacked) < size and (packed := self._packed or self._raw.read(self._READ_BYTES)):
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._unpacked += self._frame.decompress(packed)
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        if len(self._unpacked) < size and self._frame is not None:
            raise EOFError("Compressed file ended before the end of its last frame")
        found = bytes(self._unpacked[:size])
        del self._unpacked[:size]
        return found

    def close(self) -> None:
        """Whoever opened the packed file closes it."""


def _cut_chunks(path: Path, raw: BinaryIO, stream: BinaryIO, is_json: bool) -> Iterator[Chunk]:
    # Plain text is cut between paragraphs where possible, so that a document is not split by chance.
    separators = (b"\n",) if is_json else (b"\n\n", b"\n")
    line, position, rest = 1, 0, b""
    while True:
        block = stream.read(CHUNK_BYTES)
        buffer = rest + block
        if block and len(buffer) < CHUNK_BYTES:
            rest = buffer
            continue
        cut = len(buffer)
        if block:
            cut = next((end + len(mark) for mark in separators if (end := buffer.rfind(mark)) >= 0), 0)
        content, rest = buffer[:cut], buffer[cut:]
        if len(rest) > MAX_LINE_BYTES:
            raise DataError(f"{path}:{line} is longer than {MAX_LINE_BYTES} bytes; split the document")
        if content:
            end = raw.tell()
            yield Chunk(path=str(path), first_line=line, content=content, is_json=is_json, read_bytes=end - position)
            line, position = line + content.count(b"\n"), end
        if not block:
            return


def _parse_json(chunk: Chunk, keys: Sequence[str], hint: str) -> Iterator[Document | BadLine]:
    for number, line in enumerate(chunk.content.split(b"\n"), start=chunk.first_line):
        if not line or line.isspace():
            continue
        place = f"{chunk.path}:{number}"
        try:
            yield Document(place=place, texts=_pick_texts(json.loads(line.decode()), keys, hint))
        except UnicodeError:
            yield BadLine(place=place, cause="is not valid UTF-8")
        except RecursionError:
            yield BadLine(place=place, cause="is nested too deeply")
        except ValueError as error:
            yield BadLine(place=place, cause=str(error) if isinstance(error, DataError) else f"is not JSON: {error}")


def _pick_texts(values: object, keys: Sequence[str], hint: str) -> tuple[str, ...]:
    """The text of each key; the message of a DataError continues `file:line`."""
    if not isinstance(values, dict):
        raise DataError(f'holds {type(values).__name__}, not an object such as {{"{keys[0]}": ...}}')
    for key in keys:
        if key not in values:
            raise DataError(f"has no key {key!r}, only {sorted(values)[:5]}; {hint}")
        if not isinstance(values[key], str):
            raise DataError(f"has {type(values[key]).__name__} for key {key!r}, not text")
        values[key].encode()  # half of a surrogate pair can be written in JSON, and is no text
    return tuple(values[key] for key in keys)


def _parse_text(chunk: Chunk, keys: Sequence[str]) -> Iterator[Document | BadLine]:
    """Paragraphs, joined until a document has 2,000 characters; only a first key can be read from plain text."""
    if len(keys) != 1:
        raise DataError(f"{chunk.path} is plain text, which has one text per document; give one --json-keys")
    number, first, paragraphs, size = chunk.first_line, chunk.first_line, list[str](), 0
    for paragraph in chunk.content.replace(b"\r\n", b"\n").split(b"\n\n"):
        try:
            text = paragraph.decode().strip()
        except UnicodeError:
            yield BadLine(place=f"{chunk.path}:{number}", cause="begins a paragraph that is not valid UTF-8")
            text = ""
        if text:
            first = number if not paragraphs else first
            paragraphs.append(text)
            size += len(text)
        number += paragraph.count(b"\n") + 2
        if size >= TEXT_DOCUMENT_CHARACTERS:
            yield Document(place=f"{chunk.path}:{first}", texts=("\n".join(paragraphs),))
            paragraphs, size = [], 0
    if paragraphs:
        yield Document(place=f"{chunk.path}:{first}", texts=("\n".join(paragraphs),))
