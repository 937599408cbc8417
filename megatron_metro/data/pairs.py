"""Sources and targets for fine-tuning: JSON lines to ids as the model reads them, every line checked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_metro.config.errors import DataError
from megatron_metro.config.lengths import static_lengths
from megatron_metro.config.schema import RunConfig
from megatron_metro.data.cache import Arrays, load_or_build
from megatron_metro.data.corpus import BadLine, Chunk, Document, parse_chunk, read_chunks
from megatron_metro.data.manifest import hash_file
from megatron_metro.tokenizer import Tokenizer, load_tokenizer

FORM = 'give a line such as {"source": "...", "target": "..."} for each example'


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """The ids of many texts, end to end."""

    tokens: NDArray[np.int32]
    bounds: NDArray[np.int64]  # [n + 1]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, number: int) -> NDArray[np.int32]:
        return self.tokens[self.bounds[number] : self.bounds[number + 1]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """The examples of one file, framed as the model reads them; none is empty or too long."""

    path: str
    sha256: str  # of the file
    key: str  # of all that the ids depend on
    sources: Texts
    targets: Texts

    def __len__(self) -> int:
        return len(self.sources)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Side:
    """Which text of a line it is, and how long it may be as ids."""

    name: str
    limit: int
    truncates: bool
    flag: str  # that sets the limit

    def frame(self, document: Document, ids: NDArray[np.int32], tokenizer: Tokenizer) -> NDArray[np.int32]:
        """The ids with those that begin and end a text; DataError where there are none, or too many."""
        if len(ids) == 0:
            raise DataError(f'{document.place} has an empty "{self.name}"; give it a text or leave the line out')
        framed = tokenizer.vocabulary.frame(ids.tolist(), is_source=self.name == "source")
        if len(framed) > self.limit and not self.truncates:
            raise DataError(
                f'{document.place} has a "{self.name}" of {len(framed)} tokens, {self.flag} is {self.limit}; raise it, '
                f"shorten the text or give --truncate-{self.name}"
            )
        if len(framed) > self.limit:
            framed = [*framed[: self.limit - 1], tokenizer.eos_id]
        return np.array(framed, dtype=np.int32)


def open_pairs(config: RunConfig, path: str, flag: str, cache_path: str | None) -> Pairs:
    """The examples of a file of JSON lines, plain, .gz or .zst, in the ids of the run's tokenizer.

    Raises DataError naming file and line, or `flag` where there is no such file.
    """
    try:
        sha256 = hash_file(Path(path))
    except OSError as error:
        raise DataError(f"{flag} {path} cannot be read ({error.strerror}); name a file of JSON lines") from error
    tokenizer = load_tokenizer(config.tokenizer, config.model.vocab_size)
    sides = _list_sides(config)
    key = f"pairs 1 {sha256} {tokenizer.sha256} {sides}"
    arrays = load_or_build(cache_path, key, lambda: _encode(Path(path), tokenizer, sides))
    sources, targets = (
        Texts(tokens=arrays[f"{side.name}_tokens"], bounds=arrays[f"{side.name}_bounds"]) for side in sides
    )
    return Pairs(path=path, sha256=sha256, key=key, sources=sources, targets=targets)


def _list_sides(config: RunConfig) -> tuple[_Side, _Side]:
    data, lengths = config.data, static_lengths(config)
    return (
        _Side(name="source", limit=lengths.encoder, truncates=data.truncate_source, flag="--encoder-seq-length"),
        _Side(name="target", limit=lengths.decoder, truncates=data.truncate_target, flag="--decoder-seq-length"),
    )


def _encode(path: Path, tokenizer: Tokenizer, sides: Sequence[_Side]) -> Arrays:
    found: list[list[NDArray[np.int32]]] = [[] for _ in sides]
    # On a terminal alone, and only where it takes long.
    total, title = path.stat().st_size, f"tokenising {path.name}"
    with tqdm(total=total, unit="B", unit_scale=True, desc=title, delay=2, leave=False, disable=None) as bar:
        for chunk in read_chunks([path]):
            for texts, framed in zip(found, _encode_chunk(chunk, tokenizer, sides)):
                texts += framed
            bar.update(chunk.read_bytes)
    if not found[0]:
        raise DataError(f"{path} holds no example; {FORM}")
    arrays: Arrays = {}
    for side, texts in zip(sides, found):
        arrays[f"{side.name}_tokens"] = np.concatenate(texts)
        arrays[f"{side.name}_bounds"] = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return arrays


def _encode_chunk(chunk: Chunk, tokenizer: Tokenizer, sides: Sequence[_Side]) -> Iterator[list[NDArray[np.int32]]]:
    """The framed texts of each side."""
    documents = list(_parse(chunk, [side.name for side in sides]))
    for number, side in enumerate(sides):
        try:
            encoded = tokenizer.encode_batch([document.texts[number] for document in documents])
        except DataError as error:
            raise DataError(f"{chunk.path}, from line {chunk.first_line} on: {error}") from error
        yield [side.frame(*pair, tokenizer) for pair in zip(documents, encoded)]


def _parse(chunk: Chunk, keys: Sequence[str]) -> Iterator[Document]:
    if not chunk.is_json:
        raise DataError(f"{chunk.path} is plain text; {FORM}")
    for found in parse_chunk(chunk, keys, FORM):
        if isinstance(found, BadLine):
            raise DataError(f"{found.place} {found.cause}")
        yield found
