"""Raw text to token files: parallel, in order, published whole or not at all."""

import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_metro.config.errors import ConfigError, DataError
from megatron_metro.data.corpus import BadLine, Chunk, Document, find_inputs, parse_chunk, read_chunks
from megatron_metro.data.indexed import TokenWriter, list_store_files
from megatron_metro.data.workers import WorkerPool
from megatron_metro.tokenizer import Tokenizer

LISTED_BAD_LINES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessOptions:
    """What to read, how to cut it up and where to put it."""

    inputs: tuple[str, ...]
    output_prefix: str
    json_keys: tuple[str, ...] = ("text",)
    num_workers: int = 1
    append_eod: bool = True  # </s> after each document, or after each line with split_lines
    split_lines: bool = False  # store each line of a document as a sequence, for --block-mode complete_doc
    on_error: Literal["fail", "skip"] = "fail"


@dataclass(kw_only=True, slots=True)
class PreprocessReport:
    """Counts so far."""

    prefixes: tuple[str, ...]
    num_documents: int = 0
    num_tokens: int = 0
    num_empty: int = 0  # documents without any token, left out
    num_bad: int = 0
    bad_lines: tuple[BadLine, ...] = ()  # the first ten
    read_bytes: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of all processes; known at the end

    def summarise(self) -> str:
        """One line."""
        rate = self.num_tokens / max(self.cpu_seconds, 1e-9)
        return (
            f"{self.num_documents} documents, {self.num_tokens} tokens in {self.seconds:.1f} s "
            f"({rate:,.0f} tokens per CPU second); {self.num_empty} empty, {self.num_bad} bad lines skipped"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedText:
    """Documents of one chunk and one key: all ids in a row, and the lengths of each document's sequences."""

    ids: NDArray[np.integer]
    documents: list[list[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedChunk:
    """What a worker makes of a chunk."""

    keys: tuple[EncodedText, ...]
    num_empty: int
    bad_lines: list[BadLine]
    read_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkEncoder:
    """Parses and tokenises chunks; the same in one process and in many."""

    tokenizer: Tokenizer
    options: PreprocessOptions

    def __call__(self) -> Callable[[Chunk], EncodedChunk]:
        return self.encode

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Tokens of a chunk; DataError at its first bad line unless these are to be skipped."""
        documents: list[Document] = []
        bad_lines: list[BadLine] = []
        for found in parse_chunk(chunk, self.options.json_keys):
            if isinstance(found, Document):
                documents.append(found)
            elif self.options.on_error == "fail":
                raise DataError(f"{found.place} {found.cause}; --on-error skip leaves such lines out")
            else:
                bad_lines.append(found)
        try:
            keys = [self._encode_texts([d.texts[i] for d in documents]) for i in range(len(self.options.json_keys))]
        except DataError as error:
            raise DataError(f"{chunk.path}, after line {chunk.first_line}: {error}") from error
        num_empty = len(documents) * len(keys) - sum(len(encoded.documents) for encoded in keys)
        return EncodedChunk(keys=tuple(keys), num_empty=num_empty, bad_lines=bad_lines, read_bytes=chunk.read_bytes)

    def _encode_texts(self, texts: list[str]) -> EncodedText:
        lines = [text.split("\n") if self.options.split_lines else [text] for text in texts]
        encoded = iter(self.tokenizer.encode_batch([line for document in lines for line in document]))
        end = np.array([self.tokenizer.eos_id] if self.options.append_eod else [], dtype=np.int32)
        parts: list[NDArray[np.int32]] = [end[:0]]
        documents = []
        for document in lines:
            sequences = [ids for ids in (next(encoded) for _ in document) if len(ids)]
            if sequences:
                documents.append([len(ids) + len(end) for ids in sequences])
                parts += [part for ids in sequences for part in (ids, end)]
        return EncodedText(ids=np.concatenate(parts), documents=documents)


def preprocess(
    options: PreprocessOptions, tokenizer: Tokenizer, on_progress: Callable[[PreprocessReport], None]
) -> PreprocessReport:
    """Tokenise the inputs into `<output prefix>_<key>_document` (`_sentence` with split lines) .bin, .idx and .json.

    The bytes do not depend on the number of workers. On any error nothing is left under the final names.
    """
    _check_options(options)
    level = "sentence" if options.split_lines else "document"
    prefixes = tuple(f"{options.output_prefix}_{key}_{level}" for key in options.json_keys)
    report = PreprocessReport(prefixes=prefixes)
    started, cpu_started = time.perf_counter(), _cpu_seconds()
    inputs = find_inputs(options.inputs)
    _check_outputs(prefixes, inputs)
    chunks = read_chunks(inputs)
    with ExitStack() as stack:
        encoder = ChunkEncoder(tokenizer=tokenizer, options=options)
        encoded_chunks = stack.enter_context(_Encoding(encoder, chunks, options.num_workers))
        writers = [
            stack.enter_context(TokenWriter(prefix, tokenizer, options.append_eod, options.split_lines))
            for prefix in prefixes
        ]
        for encoded in encoded_chunks:
            for writer, text in zip(writers, encoded.keys):
                writer.add_documents(text.ids, text.documents)
            _count(report, encoded, writers, time.perf_counter() - started)
            on_progress(report)
        for key, writer in zip(options.json_keys, writers):
            if writer.num_documents == 0:
                raise DataError(f"--input {' '.join(options.inputs)} holds no text of key {key!r}; nothing is written")
        for writer in writers:
            writer.finish()
    report.seconds = time.perf_counter() - started
    report.cpu_seconds = _cpu_seconds() - cpu_started
    return report


class _Encoding:
    """Encoded chunks in the order of the chunks, made here or by workers."""

    def __init__(self, encoder: ChunkEncoder, chunks: Iterator[Chunk], num_workers: int) -> None:
        self._encoder = encoder
        self._chunks = chunks
        # Forked workers inherit the tokenizer and start at once; this process has no threads.
        self._pool = WorkerPool(encoder, num_workers, "preprocessing", "fork") if num_workers > 1 else None

    def __enter__(self) -> Iterator[EncodedChunk]:
        return map(self._encoder.encode, self._chunks) if self._pool is None else self._encode_by(self._pool)

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.close()

    def _encode_by(self, pool: WorkerPool[Chunk, EncodedChunk]) -> Iterator[EncodedChunk]:
        busy: deque[int] = deque()
        for chunk in self._chunks:
            if len(busy) < len(pool):
                worker, encoded = len(busy), None
            else:
                worker = busy.popleft()
                encoded = pool.result(worker)
            # The worker gets its next chunk before this process turns to writing.
            pool.submit(worker, chunk)
            busy.append(worker)
            if encoded is not None:
                yield encoded
        while busy:
            yield pool.result(busy.popleft())


def _check_options(options: PreprocessOptions) -> None:
    if options.num_workers < 1:
        raise ConfigError(f"--workers is {options.num_workers}; give 1 or more")
    if len(set(options.json_keys)) != len(options.json_keys) or not all(options.json_keys):
        raise ConfigError(f"--json-keys {' '.join(options.json_keys)}: give each key once")
    for key in options.json_keys:
        if "/" in key or "\0" in key:
            raise ConfigError(f"--json-keys {key!r} becomes part of a file name; rename the key")
    if not Path(options.output_prefix).name or options.output_prefix.endswith("/"):
        raise ConfigError(
            f"--output-prefix {options.output_prefix!r} names a folder; add how the files' names begin, for example "
            f"{Path(options.output_prefix) / 'corpus'}"
        )


def _check_outputs(prefixes: Sequence[str], inputs: Sequence[Path]) -> None:
    """Refuse to write over the text that is read."""
    outputs = {path.resolve() for prefix in prefixes for path in list_store_files(prefix)}
    for path in inputs:
        if path.resolve() in outputs:
            raise ConfigError(f"--output-prefix: {path} is an --input and would be written over; choose another prefix")


def _count(report: PreprocessReport, encoded: EncodedChunk, writers: list[TokenWriter], seconds: float) -> None:
    report.num_documents = sum(writer.num_documents for writer in writers)
    report.num_tokens = sum(writer.num_tokens for writer in writers)
    report.num_empty += encoded.num_empty
    report.num_bad += len(encoded.bad_lines)
    report.bad_lines = (*report.bad_lines, *encoded.bad_lines)[:LISTED_BAD_LINES]
    report.read_bytes += encoded.read_bytes
    report.seconds = seconds


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
