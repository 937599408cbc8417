"""Token files: Megatron-Core's .bin and .idx, byte-compatible both ways, checked before they are trusted."""

import hashlib
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from numpy.typing import NDArray

from megatron_metro.config.errors import DataError
from megatron_metro.config.files import publish, temporary_sibling
from megatron_metro.data.manifest import (
    Manifest,
    Origin,
    block_checksums,
    check_files,
    hash_file,
    manifest_path,
    read_manifest,
)
from megatron_metro.tokenizer import Tokenizer, Vocabulary

MAGIC = b"MMIDIDX\x00\x00"
TOKEN_CODES = {DType.code_from_dtype(kind) for kind in (np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16)}
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, entries of the document table
CHECKED_ENTRIES = 2**20  # entries of the index compared at once
SAMPLED_TOKENS = 2**18  # tokens at either end looked at before training


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStore:
    """An open data set; its arrays are views of memory maps that live as long as the store."""

    prefix: str
    tokens: NDArray[np.integer]  # all tokens, in order
    sequence_lengths: NDArray[np.int32]
    document_ends: NDArray[np.int64]  # sequences before the end of each document, beginning with 0
    content_sha256: str  # of the .idx: the same for a copy elsewhere, another for other text
    manifest: Manifest | None
    dataset: IndexedDataset  # owns the maps: they are closed under their views when it goes

    @property
    def full_sha256(self) -> str:
        """Of the .idx and, where there is a manifest, of the checksums of the .bin."""
        checksums = () if self.manifest is None else self.manifest.bin_crc32
        return hashlib.sha256(f"{self.content_sha256} {checksums}".encode()).hexdigest()

    @property
    def num_documents(self) -> int:
        """Documents in the data set."""
        return len(self.document_ends) - 1

    def token_offset(self, document: int) -> int:
        """Tokens before a document."""
        sequence = int(self.document_ends[document])
        if sequence == len(self.sequence_lengths):
            return len(self.tokens)
        return int(self.dataset.index.sequence_pointers[sequence]) // self.tokens.itemsize


def list_store_files(prefix: str) -> tuple[Path, ...]:
    """The files a data set is made of: tokens, index and manifest."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), manifest_path(prefix)


def open_store(prefix: str, vocabulary: Vocabulary, tokenizer_sha256: str) -> TokenStore:
    """Open a data set and check that it is whole and made for this tokenizer; DataError names what is wrong."""
    check_index(prefix)
    manifest = read_manifest(prefix)
    if manifest is not None:
        check_files(prefix, manifest)
        if (manifest.tokenizer_sha256, manifest.num_pieces) != (tokenizer_sha256, vocabulary.num_pieces):
            raise DataError(
                f"--data-path {prefix} was made with tokenizer {manifest.tokenizer_sha256[:12]} of "
                f"{manifest.num_pieces} pieces and --pre-tokenizer {manifest.pre_tokenizer}, the run's is "
                f"{tokenizer_sha256[:12]} of {vocabulary.num_pieces}; "
                "give that tokenizer or preprocess again"
            )
    dataset = IndexedDataset(prefix)
    num_tokens = Path(f"{prefix}.bin").stat().st_size // dataset.index.dtype_size
    tokens = dataset.bin_reader.read(dataset.index.dtype, num_tokens, 0)
    for sample in (tokens[:SAMPLED_TOKENS], tokens[-SAMPLED_TOKENS:]):
        check_ids(sample, vocabulary, prefix)
    return TokenStore(
        prefix=prefix,
        tokens=tokens,
        sequence_lengths=dataset.index.sequence_lengths,
        document_ends=dataset.index.document_indices,
        content_sha256=hash_file(Path(f"{prefix}.idx")) if manifest is None else manifest.idx_sha256,
        manifest=manifest,
        dataset=dataset,
    )


def check_ids(ids: NDArray[np.integer], vocabulary: Vocabulary, source: str) -> None:
    """DataError when text holds an id it cannot have: negative, pad, mask, a sentinel or beyond the vocabulary."""
    wrong = (ids >= vocabulary.num_pieces) | (ids < 0) | (ids == vocabulary.pad_id)
    if vocabulary.mask_id is not None:
        wrong |= ids == vocabulary.mask_id
    if wrong.any():
        raise DataError(
            f"{source} holds id {ids[wrong][0]}, which is no text in a vocabulary of {vocabulary.num_pieces} pieces; "
            "give the tokenizer the data was made with"
        )


def verify_store(prefix: str, vocabulary: Vocabulary, tokenizer_sha256: str) -> TokenStore:
    """Open a data set and check every byte against the manifest and every id against the vocabulary."""
    store = open_store(prefix, vocabulary, tokenizer_sha256)
    if store.manifest is not None:
        check_files(prefix, store.manifest, all_blocks=True)
    for start in range(0, len(store.tokens), CHECKED_ENTRIES):
        check_ids(store.tokens[start : start + CHECKED_ENTRIES], vocabulary, prefix)
    return store


def check_index(prefix: str) -> type[np.number]:
    """Everything that must hold between the numbers of the .idx and the size of the .bin; the type of the tokens."""
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, data):
        if not path.is_file():
            raise DataError(f"{path} is missing; a data set is a .bin and an .idx file of one prefix")
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty; preprocess the data again")
    idx_bytes, bin_bytes = idx.stat().st_size, data.stat().st_size
    if idx_bytes < HEADER.size:
        raise DataError(f"{idx} has {idx_bytes} bytes, its header needs {HEADER.size}; preprocess the data again")
    with idx.open("rb") as stream:
        magic, version, code, num_sequences, num_entries = HEADER.unpack(stream.read(HEADER.size))
    if magic != MAGIC or version != 1:
        raise DataError(f"{idx} begins with {magic!r} version {version}, not {MAGIC!r} version 1; it is no token index")
    if code not in TOKEN_CODES:
        raise DataError(f"{idx} has dtype code {code}, tokens need one of {sorted(TOKEN_CODES)}; preprocess again")
    needed = HEADER.size + 12 * num_sequences + 8 * num_entries
    if idx_bytes != needed:
        raise DataError(
            f"{idx} has {idx_bytes} bytes, {num_sequences} sequences and {num_entries} document entries need {needed}; "
            "preprocess the data again"
        )
    if num_sequences == 0 or num_entries < 2:
        raise DataError(f"{idx} holds {num_sequences} sequences in {max(num_entries - 1, 0)} documents: no text")
    table = np.memmap(idx, mode="r")
    lengths = np.frombuffer(table, np.dtype("<i4"), num_sequences, HEADER.size)
    pointers = np.frombuffer(table, np.dtype("<i8"), num_sequences, HEADER.size + 4 * num_sequences)
    document_ends = np.frombuffer(table, np.dtype("<i8"), num_entries, HEADER.size + 12 * num_sequences)
    used_bytes = _check_pointers(idx, lengths, pointers, DType.size(code))
    if bin_bytes != used_bytes:
        raise DataError(
            f"{data} has {bin_bytes} bytes, its index needs {used_bytes}; copy or preprocess the data again"
        )
    if document_ends[0] != 0 or document_ends[-1] != num_sequences or (np.diff(document_ends) < 0).any():
        raise DataError(f"{idx} has a document table that does not rise from 0 to {num_sequences}; preprocess again")
    kind: type[np.number] = DType.dtype_from_code(code)
    return kind


def _check_pointers(idx: Path, lengths: NDArray[np.int32], pointers: NDArray[np.int64], itemsize: int) -> int:
    """Bytes the sequences take; every pointer must follow from the lengths before it."""
    position = 0
    for start in range(0, len(lengths), CHECKED_ENTRIES):
        part = lengths[start : start + CHECKED_ENTRIES]
        ends = position + np.cumsum(part, dtype=np.int64) * itemsize
        begins = ends - part.astype(np.int64) * itemsize
        if (part < 0).any() or (pointers[start : start + CHECKED_ENTRIES] != begins).any():
            raise DataError(f"{idx} has lengths and pointers that do not belong together; preprocess the data again")
        position = int(ends[-1])
    return position


class StoreFiles:
    """The files of a new data set under temporary names, filled through core's builder.

    `publish` gives them their final names, leaving the block without it removes them.
    """

    def __init__(self, prefix: str, dtype: type[np.number]) -> None:
        self._prefix = prefix
        self._dtype = dtype
        self._stack = ExitStack()

    def __enter__(self) -> "StoreFiles":
        self._bin, self._idx = (
            self._stack.enter_context(temporary_sibling(path)) for path in list_store_files(self._prefix)[:2]
        )
        self.builder = IndexedDatasetBuilder(str(self._bin), dtype=self._dtype)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.builder.data_file.close()
        self._stack.__exit__(kind, error, trace)

    def publish(self, origin: Origin | None) -> Manifest | None:
        """Publish .bin, .idx and manifest; without an origin there is none, as beside Megatron's own files."""
        self.builder.finalize(str(self._idx))
        manifest = None if origin is None else self._describe(origin)
        final_bin, final_idx, final_note = list_store_files(self._prefix)
        with temporary_sibling(final_note) as note:
            note.write_bytes(b"" if manifest is None else manifest.to_json())
            # An older index or manifest must not be taken for the new tokens' if this process ends half-way.
            for old in (final_note, final_idx):
                old.unlink(missing_ok=True)
            publish(self._bin, final_bin)
            publish(self._idx, final_idx)
            if manifest is not None:
                publish(note, final_note)
        return manifest

    def _describe(self, origin: Origin) -> Manifest:
        bin_bytes = self._bin.stat().st_size
        return Manifest(
            tokenizer_sha256=origin.tokenizer_sha256,
            normalizer=origin.normalizer,
            pre_tokenizer=origin.pre_tokenizer,
            num_pieces=origin.num_pieces,
            num_documents=len(self.builder.document_indices) - 1,
            num_sequences=len(self.builder.sequence_lengths),
            num_tokens=bin_bytes // DType.size(self._dtype),
            dtype=np.dtype(self._dtype).name,
            append_eod=origin.append_eod,
            split_lines=origin.split_lines,
            bin_bytes=bin_bytes,
            idx_bytes=self._idx.stat().st_size,
            idx_sha256=hash_file(self._idx),
            bin_crc32=tuple(block_checksums(self._bin)),
        )


class TokenWriter:
    """Writes a data set of one tokenizer's ids; nothing appears before `finish`."""

    def __init__(self, prefix: str, tokenizer: Tokenizer, append_eod: bool, split_lines: bool) -> None:
        self.prefix = prefix
        self.num_tokens = 0
        self.num_documents = 0
        self._vocabulary = tokenizer.vocabulary
        self._origin = Origin(
            tokenizer_sha256=tokenizer.sha256,
            normalizer=tokenizer.normalizer,
            pre_tokenizer=tokenizer.pre_tokenizer,
            num_pieces=tokenizer.num_pieces,
            append_eod=append_eod,
            split_lines=split_lines,
        )
        self._dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self._files = StoreFiles(prefix, self._dtype)

    def __enter__(self) -> "TokenWriter":
        self._files.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)

    def add_documents(self, ids: NDArray[np.integer], documents: Sequence[Sequence[int]]) -> None:
        """Append documents, each given by the lengths of its sequences; `ids` are all their tokens.

        Ids outside the tokenizer's pieces are refused: the file's type would wrap them silently.
        """
        check_ids(ids, self._vocabulary, f"{self.prefix}.bin")
        ids = ids.astype(self._dtype, copy=False)
        start = 0
        for lengths in documents:
            stop = start + sum(lengths)
            if stop - start >= 2**31:
                raise DataError(
                    f"{self.prefix}: a document has {stop - start} tokens, an index holds 2^31 - 1; split it"
                )
            self._files.builder.add_document(ids[start:stop], lengths)
            start = stop
        assert start == len(ids)
        self.num_tokens += start
        self.num_documents += len(documents)

    def finish(self) -> Manifest:
        """Publish .bin, .idx and manifest; DataError when there is no document."""
        if self.num_documents == 0:
            raise DataError(f"{self.prefix}: the input holds no text; nothing is written")
        manifest = self._files.publish(self._origin)
        assert manifest is not None
        return manifest
