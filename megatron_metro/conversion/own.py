"""Our own checkpoints as a source and as a target of conversion."""

import dataclasses
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from megatron_metro.checkpoint.folder import find_step
from megatron_metro.checkpoint.reader import StepReader, open_step
from megatron_metro.checkpoint.release import write_release
from megatron_metro.config.errors import CheckpointError
from megatron_metro.config.fields import Value
from megatron_metro.config.schema import CheckpointConfig
from megatron_metro.conversion.foreign import complete_run
from megatron_metro.conversion.tokenizer_files import open_tokenizer
from megatron_metro.conversion.weights import Source, TensorFile, check_finite
from megatron_metro.conversion.whole_model import read_run
from megatron_metro.model.weights import weight_shapes

TOKENIZER = "tokenizer.model"


class StepWeights:
    """The weights of a step, without optimizer state; all methods raise CheckpointError."""

    def __init__(self, reader: StepReader) -> None:
        self._reader = reader

    def names(self) -> tuple[str, ...]:
        """All weights."""
        return self._reader.weight_names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole weight."""
        return self._reader.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._reader.dtype(name)

    def read(self, name: str) -> Tensor:
        """A whole weight."""
        weight = self._reader.read(name)
        check_finite(weight, name, self._reader.folder)
        return weight


def read_step(folder: Path, iteration: int | None, settings: Mapping[str, Value]) -> Source:
    """The newest step of a run, which may go on meanwhile, or one of its iterations; verified byte by byte.

    Raises CheckpointError, UnsafeError, and ConfigError where `settings` describe another model or tokenizer.
    """
    try:
        found = find_step(CheckpointConfig(load=str(folder), ckpt_step=iteration, exit_on_missing_checkpoint=True))
    except CheckpointError as error:
        words = str(error).replace("--load", "--input").replace("--ckpt-step", "--step")
        raise CheckpointError(words) from error
    assert found is not None, "find_step raises where there is none"
    reader = open_step(found)
    run = complete_run(read_run(reader), settings)
    weights = StepWeights(reader)
    shapes = {name: weights.shape(name) for name in weights.names()}
    if shapes != weight_shapes(run.model):
        raise CheckpointError(f"{found}: its weights are not those of its configuration; choose another step")
    sha256 = (reader.document.get("identity") or {}).get("tokenizer_sha256")
    return Source(run=run, weights=weights, place=found, tokenizer=open_tokenizer(run, sha256))


def write_step(source: Source, folder: Path, origin: str, check: Callable[[TensorFile, Path], None]) -> None:
    """Write weights as `release`, which runs start from, with a copy of the tokenizer beside it.

    `check` reads what was written before it has its name. Raises CheckpointError where the folder is in use,
    StorageError where the file system refuses.
    """
    run, identity = source.run, None
    if source.tokenizer is not None:
        path = folder.resolve() / TOKENIZER
        run = dataclasses.replace(run, tokenizer=dataclasses.replace(run.tokenizer, tokenizer_model=str(path)))
        tokenizer = source.tokenizer
        identity = {
            "tokenizer_sha256": tokenizer.sha256,
            "normalizer": tokenizer.normalizer,
            "pre_tokenizer": tokenizer.pre_tokenizer,
            "text": [],
        }
    document = {
        "config": dataclasses.asdict(run),
        "identity": identity,
        "versions": {"torch": torch.__version__, "megatron-core": version("megatron-core"), "converted from": origin},
    }
    weights = source.weights
    write_release(
        folder,
        ((name, weights.read(name)) for name in weights.names()),
        document,
        lambda reader: check(StepWeights(reader), reader.folder),
        beside={} if source.tokenizer is None else {TOKENIZER: source.tokenizer.model},
    )
