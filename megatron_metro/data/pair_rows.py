"""Examples to rows: one example each, or packed as many as fit; the same rows every epoch, in another order.

A block is a row as two stretches of tokens: the encoder's, with its sources end to end and then pad, and the decoder's,
likewise with the targets. Every text ends with </s>, which stands nowhere else.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_metro.config.errors import DataError
from megatron_metro.data.blocks import Blocks, TextOrigin
from megatron_metro.data.cache import load_or_build
from megatron_metro.data.order import NUM_ROUND_WORDS, order_blocks, permute
from megatron_metro.data.pairs import Pairs
from megatron_metro.data.randomness import BlockKeys, Purpose, draw_words_once

MOST_OPEN_ROWS = 64  # that wait for a small example; with more of them SST-2 has no less padding

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Which examples share a row."""

    examples: Ints  # all of them, row after row
    bounds: Ints  # [rows + 1]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, row: int) -> Ints:
        return self.examples[self.bounds[row] : self.bounds[row + 1]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSource:
    """An endless, shuffled sequence of the rows of one file; a `Source`."""

    pairs: Pairs
    rows: Rows
    widths: tuple[int, int]  # of the two stretches
    examples: tuple[int, int]  # [start, stop) of the file: what one split sees
    pad_id: int
    seed: int
    identity: int

    @property
    def origin(self) -> TextOrigin:
        """The examples of the split."""
        return TextOrigin(path=self.pairs.path, sha256=self.pairs.sha256, documents=self.examples)

    @property
    def num_blocks(self) -> int:
        """Rows of one epoch."""
        return len(self.rows)

    @property
    def size(self) -> int:
        """Rows: without weights, the epochs of all files of a blend end together."""
        return self.num_blocks

    def describe(self) -> str:
        """Examples and rows of an epoch, and how much of these is padding."""
        lengths = _list_lengths(self.pairs)[self.rows.examples].sum(axis=0)
        shares = 1 - lengths / (np.array(self.widths) * self.num_blocks)
        return (
            f"{len(self.rows.examples)} examples in {self.num_blocks} rows per epoch, of which {shares[0]:.0%} "
            f"(encoder) and {shares[1]:.0%} (decoder) are padding"
        )

    def verify(self, tokenizer_sha256: str) -> None:
        """Nothing is left to check: every line was read when the file was opened."""

    def read(self, ordinals: Ints) -> Blocks:
        """The rows at these places of the sequence."""
        epochs, blocks = order_blocks(ordinals, self.num_blocks, self.seed, self.identity)
        tokens = np.full((len(blocks), sum(self.widths)), self.pad_id, dtype=np.int64)
        lengths = np.zeros(len(blocks), dtype=np.int64)
        for row, block in enumerate(blocks):
            for first, texts in ((0, self.pairs.sources), (self.widths[0], self.pairs.targets)):
                stretch = np.concatenate([texts[example] for example in self.rows[block]])
                tokens[row, first : first + len(stretch)] = stretch
                lengths[row] += len(stretch)
        keys = BlockKeys(
            seed=self.seed,
            identity=np.full(len(blocks), self.identity, dtype=np.uint64),
            epoch=epochs,
            block=blocks,
        )
        return Blocks(tokens=tokens, lengths=lengths, keys=keys)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPlan:
    """How rows are made: their widths, what fixes their order, and where packed ones are kept."""

    widths: tuple[int, int]
    is_packed: bool
    seed: int
    identity: int
    cache_path: str | None


def build_pair_source(pairs: Pairs, examples: tuple[int, int], plan: RowPlan, pad_id: int) -> PairSource:
    """The rows of some of the examples; DataError where there are none."""
    start, stop = examples
    if start == stop:
        raise DataError(
            f"{pairs.path}: none of its {len(pairs)} examples is in this split; give more, another --split, or "
            "--train-data-path and --valid-data-path"
        )
    rows = Rows(examples=np.arange(start, stop), bounds=np.arange(stop - start + 1))
    if plan.is_packed:
        words = draw_words_once(plan.seed, plan.identity, Purpose.PACKING, 0, NUM_ROUND_WORDS)
        arrivals = start + permute(np.arange(stop - start), stop - start, words)
        arrays = load_or_build(
            plan.cache_path,
            f"rows 1 {pairs.key} {start} {stop} {plan.widths} {plan.seed} {plan.identity}",
            lambda: _join(list(fill_rows(_list_lengths(pairs), arrivals, plan.widths))),
        )
        rows = Rows(examples=arrays["examples"], bounds=arrays["bounds"])
    return PairSource(
        pairs=pairs,
        rows=rows,
        widths=plan.widths,
        examples=examples,
        pad_id=pad_id,
        seed=plan.seed,
        identity=plan.identity,
    )


def fill_rows(lengths: Ints, arrivals: Ints, widths: tuple[int, int]) -> Iterator[list[int]]:
    """Examples dealt out to rows: each, as they arrive, to the oldest open row with room for both its sides.

    `lengths` [n, 2] are those of sources and targets, none beyond its width. Where no open row has room, the oldest is
    closed.
    """
    members: list[list[int]] = [[] for _ in range(MOST_OPEN_ROWS)]
    room = np.zeros((MOST_OPEN_ROWS, 2), dtype=np.int64)
    oldest = 0
    for example in arrivals.tolist():
        has_room = np.roll((room >= lengths[example]).all(axis=1), -oldest)
        place = (int(has_room.argmax()) + oldest) % MOST_OPEN_ROWS
        if not has_room.any():
            place, oldest = oldest, (oldest + 1) % MOST_OPEN_ROWS
            if members[place]:
                yield members[place]
            members[place], room[place] = [], widths
        members[place].append(example)
        room[place] -= lengths[example]
    yield from (row for row in members[oldest:] + members[:oldest] if row)


def _list_lengths(pairs: Pairs) -> Ints:
    """[n, 2] tokens of sources and targets."""
    return np.stack([np.diff(pairs.sources.bounds), np.diff(pairs.targets.bounds)], axis=1)


def _join(rows: list[list[int]]) -> dict[str, Ints]:
    return {
        "examples": np.array([example for row in rows for example in row], dtype=np.int64),
        "bounds": np.cumsum([0, *map(len, rows)], dtype=np.int64),
    }
