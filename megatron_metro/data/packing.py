"""Documents to blocks: which stretch of tokens each block is, and the blocks themselves.

Both ways give every block as one stretch (start, length) of the stored tokens, so the same reader serves both.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_metro.config.errors import DataError
from megatron_metro.data.blocks import Blocks, TextOrigin
from megatron_metro.data.cache import Arrays, load_or_build
from megatron_metro.data.indexed import TokenStore, check_ids, verify_store
from megatron_metro.data.order import order_blocks
from megatron_metro.data.randomness import (
    BlockKeys,
    Purpose,
    draw_words,
    draw_words_once,
    to_integers,
)
from megatron_metro.tokenizer import Vocabulary

Ints = NDArray[np.int64]


class Packing(Protocol):
    """The blocks of one data set and one split."""

    @property
    def num_blocks(self) -> int:
        """Blocks of one epoch."""

    def locate(self, epoch: int, blocks: Ints) -> tuple[Ints, Ints]:
        """(first token, number of tokens) of blocks, <s> not counted; a stretch may run on at the first token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FullPacking:
    """Blocks of exactly `body_length` tokens of the document stream; each epoch cuts it at other places.

    The stream is a ring that starts at a random token each epoch, so no token is left out for ever.
    """

    first_token: int
    num_tokens: int
    body_length: int
    seed: int
    identity: int

    @property
    def num_blocks(self) -> int:
        """Blocks of one epoch; fewer than `body_length` tokens are left over."""
        return self.num_tokens // self.body_length

    def locate(self, epoch: int, blocks: Ints) -> tuple[Ints, Ints]:
        """(first token, number of tokens) of blocks."""
        word = draw_words_once(self.seed, self.identity, Purpose.SHIFT, epoch, 1)[0]
        starts = (int(word) % self.num_tokens + blocks * self.body_length) % self.num_tokens
        return self.first_token + starts, np.full(len(blocks), self.body_length, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentPacking:
    """Whole lines of one document per block, padded (reference section 3.1); the same blocks every epoch."""

    starts: Ints
    lengths: NDArray[np.int32]

    @property
    def num_blocks(self) -> int:
        """Blocks of one epoch."""
        return len(self.starts)

    def locate(self, epoch: int, blocks: Ints) -> tuple[Ints, Ints]:
        """(first token, number of tokens) of blocks."""
        return self.starts[blocks], self.lengths[blocks].astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRange:
    """Documents [start, stop) of a data set: what one split sees of it."""

    store: TokenStore
    start: int
    stop: int

    @property
    def first_token(self) -> int:
        """Tokens before the range."""
        return self.store.token_offset(self.start)

    @property
    def num_tokens(self) -> int:
        """Tokens in the range."""
        return self.store.token_offset(self.stop) - self.first_token


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSource:
    """An endless, shuffled sequence of the blocks of one data set: epoch after epoch, each a new permutation."""

    documents: DocumentRange
    packing: Packing
    vocabulary: Vocabulary
    raw_length: int
    has_bos: bool
    seed: int
    identity: int

    @property
    def origin(self) -> TextOrigin:
        """The documents of the split."""
        documents = self.documents
        return TextOrigin(
            path=documents.store.prefix,
            sha256=documents.store.full_sha256,
            documents=(documents.start, documents.stop),
        )

    @property
    def num_blocks(self) -> int:
        """Blocks of one epoch."""
        return self.packing.num_blocks

    @property
    def size(self) -> int:
        """Tokens."""
        return self.documents.num_tokens

    def describe(self) -> str:
        """Documents, tokens and blocks of an epoch."""
        num_documents = self.documents.stop - self.documents.start
        return f"{num_documents} documents, {self.documents.num_tokens} tokens, {self.num_blocks} blocks per epoch"

    def verify(self, tokenizer_sha256: str) -> None:
        """Every byte against the manifest and every id against the vocabulary."""
        verify_store(self.documents.store.prefix, self.vocabulary, tokenizer_sha256)

    def read(self, ordinals: Ints) -> Blocks:
        """The blocks at these places of the sequence."""
        epochs, blocks = order_blocks(ordinals, self.num_blocks, self.seed, self.identity)
        starts, lengths = np.empty_like(blocks), np.empty_like(blocks)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            starts[rows], lengths[rows] = self.packing.locate(int(epoch), blocks[rows])
        keys = BlockKeys(
            seed=self.seed,
            identity=np.full(len(blocks), self.identity, dtype=np.uint64),
            epoch=epochs,
            block=blocks,
        )
        return Blocks(tokens=self._gather(starts, lengths), lengths=lengths + self.has_bos, keys=keys)

    def _gather(self, starts: Ints, lengths: Ints) -> Ints:
        """[b, raw_length] tokens: <s> if any, the stretch, pad."""
        body_length = self.raw_length - self.has_bos
        places = starts[:, None] + np.arange(body_length)
        end = self.documents.first_token + self.documents.num_tokens
        np.subtract(places, self.documents.num_tokens, out=places, where=places >= end)
        # What lies past a short block at the very end is replaced by pad below.
        body = self.documents.store.tokens[np.minimum(places, end - 1)]
        blocks = np.empty((len(starts), self.raw_length), dtype=np.int64)
        if self.has_bos:
            assert self.vocabulary.bos_id is not None
            blocks[:, 0] = self.vocabulary.bos_id
        blocks[:, self.has_bos :] = body
        inside = np.arange(body_length) < lengths[:, None]
        if not inside.all():
            blocks[:, self.has_bos :][~inside] = self.vocabulary.pad_id
            body = body[inside]
        check_ids(body, self.vocabulary, f"{self.documents.store.prefix}.bin")
        return blocks


def pack_full(documents: DocumentRange, body_length: int, seed: int, identity: int) -> FullPacking:
    """Full blocks; DataError when the documents do not fill one."""
    if documents.num_tokens < body_length:
        raise DataError(
            f"{documents.store.prefix}: {documents.stop - documents.start} documents of this split hold "
            f"{documents.num_tokens} tokens, a block needs {body_length}; give more text, another --split or a "
            "smaller --encoder-seq-length"
        )
    return FullPacking(
        first_token=documents.first_token,
        num_tokens=documents.num_tokens,
        body_length=body_length,
        seed=seed,
        identity=identity,
    )


def pack_documents(
    documents: DocumentRange, body_length: int, seed: int, identity: int, is_training: bool, cache_path: str | None
) -> DocumentPacking:
    """Blocks of whole lines; lines that fit no block are cropped in training and left out in validation."""
    store = documents.store
    has_lines = len(store.sequence_lengths) > store.num_documents
    if not (has_lines if store.manifest is None else store.manifest.split_lines):
        raise DataError(
            f"{store.prefix} stores whole documents; --block-mode complete_doc packs lines: preprocess it with "
            "--split-lines"
        )
    key = f"complete_doc 1 {store.content_sha256} {documents.start} {documents.stop} {body_length} {is_training}"
    arrays = load_or_build(
        cache_path,
        f"{key} {seed} {identity}",
        lambda: _find_blocks(documents, body_length, seed, identity, is_training),
    )
    if len(arrays["starts"]) == 0:
        raise DataError(f"{store.prefix}: no document of this split gives a block; give more text or another --split")
    return DocumentPacking(starts=arrays["starts"], lengths=arrays["lengths"])


def _find_blocks(documents: DocumentRange, limit: int, seed: int, identity: int, is_training: bool) -> Arrays:
    """Greedily whole lines while they fit `limit` tokens, never across documents; blocks of one token are dropped."""
    bounds = documents.store.document_ends[documents.start : documents.stop + 1]
    bounds = bounds - bounds[0]
    first_line = int(documents.store.document_ends[documents.start])
    line_lengths = documents.store.sequence_lengths[first_line : first_line + int(bounds[-1])].astype(np.int64)
    line_starts = documents.first_token + np.cumsum(line_lengths) - line_lengths
    kept = np.minimum(line_lengths, limit) if is_training else line_lengths
    ends = np.concatenate([[0], np.cumsum(kept)])
    document_end = np.repeat(bounds[1:], np.diff(bounds))
    # The line after the block that begins at each line; a line over the limit is a block of its own.
    following = np.searchsorted(ends, ends[:-1] + limit, side="right") - 1
    following = np.minimum(np.maximum(following, np.arange(len(kept)) + 1), document_end)

    firsts = []
    current = bounds[:-1][np.diff(bounds) > 0]
    while len(current):
        firsts.append(current)
        after = following[current]
        current = after[after < document_end[current]]
    first = np.sort(np.concatenate(firsts)) if firsts else np.zeros(0, dtype=np.int64)
    lengths = ends[following[first]] - ends[first]
    usable = (lengths > 1) & (lengths <= limit)
    first, lengths = first[usable], lengths[usable]
    starts = line_starts[first] + _crop(line_lengths[first] - kept[first], first_line + first, seed, identity)
    return {"starts": starts, "lengths": lengths.astype(np.int32)}


def _crop(excess: Ints, lines: Ints, seed: int, identity: int) -> Ints:
    """Tokens cut from the front of each overlong line: uniform in [0, excess - 1], the same every epoch."""
    crops = np.zeros_like(excess)
    rows = np.nonzero(excess)[0]
    keys = BlockKeys(
        seed=seed,
        identity=np.full(len(rows), identity, dtype=np.uint64),
        epoch=np.zeros(len(rows), dtype=np.int64),
        block=lines[rows],
    )
    crops[rows] = to_integers(draw_words(keys, Purpose.CROP, 1)[:, 0], excess[rows])
    return crops
