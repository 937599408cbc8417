"""Several data sets as one endless sequence of blocks: weights, splits and which sample comes from where."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_metro.config.blend import parse_blend, parse_split
from megatron_metro.config.errors import ConfigError
from megatron_metro.config.schema import RunConfig
from megatron_metro.data.blocks import Blocks
from megatron_metro.data.indexed import open_store
from megatron_metro.data.objectives import Objective
from megatron_metro.data.packing import BlockSource, DocumentRange, Packing, pack_documents, pack_full
from megatron_metro.data.randomness import BlockKeys
from megatron_metro.tokenizer import Vocabulary

Ints = NDArray[np.int64]
Part = Literal["train", "valid"]
PARTS: tuple[Part, ...] = ("train", "valid")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFacts:
    """What opening token files needs to know of the tokenizer."""

    vocabulary: Vocabulary
    tokenizer_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Sample i of a run, for any i: from which data set, and its block."""

    sources: tuple[BlockSource, ...]
    weights: tuple[float, ...]  # sum to 1

    def read(self, samples: Ints) -> Blocks:
        """The blocks of ascending sample numbers."""
        first = int(samples[0])
        sources, ordinals = assign_samples(self.weights, first, int(samples[-1]) + 1)
        sources, ordinals = sources[samples - first], ordinals[samples - first]
        rows = [np.nonzero(sources == source)[0] for source in range(len(self.sources))]
        parts = [self.sources[i].read(ordinals[found]) for i, found in enumerate(rows) if len(found)]
        return _reorder(parts, np.argsort(np.concatenate(rows)))

    def describe(self) -> list[str]:
        """One line per data set: prefix, share, documents, tokens and blocks of an epoch."""
        return [
            f"{source.documents.store.prefix}: {weight:.2%} of samples, "
            f"{source.documents.stop - source.documents.start} documents, {source.documents.num_tokens} tokens, "
            f"{source.packing.num_blocks} blocks per epoch"
            for source, weight in zip(self.sources, self.weights)
        ]


def assign_samples(weights: Sequence[float], start: int, stop: int) -> tuple[Ints, Ints]:
    """(data set, its running number) of samples [start, stop); any range can be asked for by itself.

    Sample k of a data set with weight w is due at time (k + 1/2) / w, and samples come in the order they are due: each
    is from the data set furthest behind its share, which stays within one sample per data set of weight x count.
    """
    shares = np.asarray(weights, dtype=np.float64)
    slack = len(shares) + 1
    # By time t about t samples are due, at most half a sample per data set more or fewer.
    first = np.maximum(np.floor(shares * (start - slack) - 0.5), 0).astype(np.int64)
    last = np.ceil(shares * (stop + slack) + 0.5).astype(np.int64)
    sources = np.repeat(np.arange(len(shares)), last - first)
    ordinals = np.concatenate([np.arange(begin, end) for begin, end in zip(first, last)])
    order = np.lexsort((sources, (ordinals + 0.5) / shares[sources]))
    wanted = order[start - int(first.sum()) :][: stop - start]
    return sources[wanted], ordinals[wanted]


def build_mixture(config: RunConfig, facts: TextFacts, objective: Objective, part: Part) -> Mixture | None:
    """The samples of one part of a run; None for validation when the configuration gives it no documents."""
    data = config.data
    own = {"train": data.train_data_path, "valid": data.valid_data_path}
    values, flag, start, stop = own[part], f"--{part}-data-path", 0.0, 1.0
    if not any(own.values()):
        shares = parse_split(data.split)
        values, flag = data.data_path, "--data-path"
        start = sum(shares[: PARTS.index(part)])
        stop = start + shares[PARTS.index(part)]
    if part == "valid" and (not values or start == stop):
        return None
    if not values:
        raise ConfigError(f"{flag} is not given; name the prefix that tools/preprocess_data.py wrote")
    sources = []
    pairs = parse_blend(values, flag)
    for position, (_, prefix) in enumerate(pairs):
        store = open_store(prefix, facts.vocabulary, facts.tokenizer_sha256)
        bounds = [round(share * store.num_documents) for share in (start, stop)]
        documents = DocumentRange(store=store, start=bounds[0], stop=bounds[1])
        sources.append(_build_source(config, facts, objective, documents, f"{position} {part}"))
    # Without weights a data set counts by its size.
    weights = [source.documents.num_tokens if weight is None else weight for source, (weight, _) in zip(sources, pairs)]
    return Mixture(sources=tuple(sources), weights=tuple(weight / sum(weights) for weight in weights))


def _build_source(
    config: RunConfig, facts: TextFacts, objective: Objective, documents: DocumentRange, place: str
) -> BlockSource:
    # The same text twice in a blend, or in both parts, must not be masked alike; where the file lies is no matter.
    digest = hashlib.sha256(f"{documents.store.content_sha256} {place}".encode()).digest()
    identity, seed = int.from_bytes(digest[:8], "little"), config.training.seed
    body_length = objective.raw_length - objective.has_bos
    packing: Packing
    if config.data.block_mode == "full":
        packing = pack_full(documents, body_length, seed, identity)
    else:
        cache_path = find_cache_path(config)
        packing = pack_documents(documents, body_length, seed, identity, place.endswith("train"), cache_path)
    return BlockSource(
        documents=documents,
        packing=packing,
        vocabulary=facts.vocabulary,
        raw_length=objective.raw_length,
        has_bos=objective.has_bos,
        seed=seed,
        identity=identity,
    )


def find_cache_path(config: RunConfig) -> str | None:
    """The folder of sample indices: as given, or beside the checkpoints, or none."""
    if config.data.data_cache_path is not None or config.checkpoint.save is None:
        return config.data.data_cache_path
    return str(Path(config.checkpoint.save) / "cache")


def _reorder(parts: Sequence[Blocks], order: Ints) -> Blocks:
    keys = [part.keys for part in parts]
    joined = {
        field.name: np.concatenate([getattr(key, field.name) for key in keys])[order]
        for field in fields(BlockKeys)
        if field.name != "seed"
    }
    return Blocks(
        tokens=np.concatenate([part.tokens for part in parts])[order],
        lengths=np.concatenate([part.lengths for part in parts])[order],
        keys=BlockKeys(seed=keys[0].seed, **joined),
    )
