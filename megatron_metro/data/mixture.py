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
from megatron_metro.config.objectives import OBJECTIVES
from megatron_metro.config.schema import RunConfig
from megatron_metro.data.blocks import Blocks, Source
from megatron_metro.data.indexed import open_store
from megatron_metro.data.objectives import Objective
from megatron_metro.data.packing import BlockSource, DocumentRange, Packing, pack_documents, pack_full
from megatron_metro.data.pair_rows import PairSource, RowPlan, build_pair_source
from megatron_metro.data.pairs import open_pairs
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

    sources: tuple[Source, ...]
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
        """One line per data set: path, share, and how much there is."""
        return [
            f"{source.origin.path}: {weight:.2%} of samples, {source.describe()}"
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
        raise ConfigError(f"{flag} is not given; name the prefix that tools/preprocess_data.py wrote, or JSON lines")
    blend = parse_blend(values, flag)
    places = [
        _Place(path=path, flag=flag, position=position, part=part, share=(start, stop))
        for position, (_, path) in enumerate(blend)
    ]
    sources = [_open_source(config, facts, objective, place) for place in places]
    # Without weights a data set counts by its size.
    weights = [source.size if weight is None else weight for source, (weight, _) in zip(sources, blend)]
    return Mixture(sources=tuple(sources), weights=tuple(weight / sum(weights) for weight in weights))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Which data set, or share of one, stands where in a run."""

    path: str
    flag: str
    position: int  # in the blend
    part: Part
    share: tuple[float, float]  # [start, stop) of its documents

    def bounds(self, num_documents: int) -> tuple[int, int]:
        """The documents of the share."""
        start, stop = (round(share * num_documents) for share in self.share)
        return start, stop

    def identify(self, content_sha256: str) -> int:
        """What random numbers are drawn for; where the file lies is no matter.

        The same text twice in a blend, or in both parts, must not be masked alike.
        """
        digest = hashlib.sha256(f"{content_sha256} {self.position} {self.part}".encode()).digest()
        return int.from_bytes(digest[:8], "little")


def _open_source(config: RunConfig, facts: TextFacts, objective: Objective, place: _Place) -> Source:
    open_ = _open_pairs if OBJECTIVES[config.objective.objective].reads_pairs else _open_blocks
    return open_(config, facts, objective, place)


def _open_blocks(config: RunConfig, facts: TextFacts, objective: Objective, place: _Place) -> BlockSource:
    store = open_store(place.path, facts.vocabulary, facts.tokenizer_sha256)
    start, stop = place.bounds(store.num_documents)
    documents = DocumentRange(store=store, start=start, stop=stop)
    identity, seed = place.identify(store.content_sha256), config.training.seed
    body_length = objective.raw_length - objective.has_bos
    packing: Packing
    if config.data.block_mode == "full":
        packing = pack_full(documents, body_length, seed, identity)
    else:
        packing = pack_documents(documents, body_length, seed, identity, place.part == "train", find_cache_path(config))
    return BlockSource(
        documents=documents,
        packing=packing,
        vocabulary=facts.vocabulary,
        raw_length=objective.raw_length,
        has_bos=objective.has_bos,
        seed=seed,
        identity=identity,
    )


def _open_pairs(config: RunConfig, facts: TextFacts, objective: Objective, place: _Place) -> PairSource:
    shape, cache_path = objective.shape(micro_batch_size=1), find_cache_path(config)
    pairs = open_pairs(config, place.path, place.flag, cache_path)
    plan = RowPlan(
        widths=(shape.encoder_length, shape.decoder_length),
        is_packed=config.data.pack_examples,
        seed=config.training.seed,
        identity=place.identify(pairs.sha256),
        cache_path=cache_path,
    )
    return build_pair_source(pairs, place.bounds(len(pairs)), plan, facts.vocabulary.pad_id)


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
