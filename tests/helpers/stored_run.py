"""A tiny METRO run that is saved once and then copied, damaged or poisoned by tests."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter, save

from megatron_metro.checkpoint.folder import read_document
from megatron_metro.checkpoint.manifest import MANIFEST, write_manifest
from megatron_metro.config.schema import CheckpointConfig, DataConfig, ParallelConfig, RunConfig, TokenizerConfig
from megatron_metro.model.build import build_pieces
from megatron_metro.model.weights import has_vocabulary_rows
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.parallel.stage_plan import plan_layout
from megatron_metro.training.loading import load_checkpoint
from megatron_metro.training.model_space import number
from megatron_metro.training.optimizer import build_optimizer, wrap
from megatron_metro.training.saving import save_checkpoint
from megatron_metro.training.state import TrainState
from tests.helpers.tiny import PAD_ID, VOCAB_SIZE, tiny_model, tiny_run

STEP = "iter_0000003"
RUN = replace(
    tiny_run(tiny_model(generator_num_layers=1, encoder_num_layers=1, decoder_num_layers=1)),
    tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_extra_ids=8),
    data=DataConfig(encoder_seq_length=16),
)


@dataclass
class StoredRun:
    """The saved run, and its model and optimizer, living, to load into."""

    folder: Path
    run: RunConfig
    chunks: Sequence[nn.Module]
    optimizer: MegatronOptimizer
    groups: ParallelGroups

    @property
    def step(self) -> Path:
        return self.folder / STEP

    def weights(self) -> dict[str, Tensor]:
        """Copies of all weights by name."""
        return {
            name.removeprefix("module."): parameter.detach().clone()
            for chunk in self.chunks
            for name, parameter in chunk.named_parameters()
        }

    def load(self, folder: Path) -> TrainState | None:
        """Resume from a copy of the folder."""
        run = replace(self.run, checkpoint=CheckpointConfig(load=str(folder)))
        return load_checkpoint(run, self.chunks, self.optimizer, self.groups)

    def copy(self, target: Path) -> Path:
        """A copy of the whole folder."""
        shutil.copytree(self.folder, target)
        return target


def at_layout(parallel: ParallelConfig, run: RunConfig = RUN) -> RunConfig:
    """The same run, spread over processes."""
    return replace(run, parallel=parallel)


def build_run(folder: Path, groups: ParallelGroups, run: RunConfig = RUN) -> StoredRun:
    """A model with initial weights and its optimizer, nothing saved yet."""
    run = replace(run, checkpoint=CheckpointConfig(save=str(folder)))
    chunks = wrap(run, build_pieces(run, plan_layout(run), groups, torch.float32, PAD_ID), groups)
    optimizer = build_optimizer(run, chunks, groups)
    return StoredRun(folder=folder, run=run, chunks=chunks, optimizer=optimizer, groups=groups)


def save_run(folder: Path, groups: ParallelGroups, run: RunConfig = RUN, *, noise: bool = True) -> StoredRun:
    """Build a model, with random or with initial weights, and save it as iteration 3; collective."""
    stored = build_run(folder, groups, run)
    for chunk in stored.chunks if noise else ():
        for name, parameter in chunk.named_parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
            if has_vocabulary_rows(name.removeprefix("module.")):
                parameter.data[VOCAB_SIZE:] = 0  # padding
    stored.optimizer.reload_model_params()
    save_checkpoint(stored.run, TrainState(iteration=3), stored.chunks, stored.optimizer, groups)
    if groups.rank == 0:
        sign(stored.step)
    return stored


def sign(step: Path) -> None:
    """Let a manifest vouch for the files as they are, as an attacker would."""
    document = read_document(step)
    (step / MANIFEST).unlink(missing_ok=True)
    write_manifest(step, {key: value for key, value in document.items() if key not in ("files", "sha256")})


def save_boxes(folder: Path, boxes: Sequence[tuple[str, Tensor, tuple[int, ...], tuple[int, ...]]]) -> None:
    """Tensors cut in boxes (name, numbers, offset, shape of the whole), in files of core's plan and torch's writer."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = [
        ShardedTensor(
            key=name,
            data=data,
            dtype=data.dtype,
            local_shape=tuple(data.shape),
            global_shape=shape,
            global_offset=offset,
            axis_fragmentations=None,
            replica_id=(0, 0, 0),
        )
        for name, data, offset, shape in boxes
    ]
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(number(tensors), keep_only_main_replica=True)
    save(
        mcore_to_pyt_state_dict(by_key, is_loading=False),
        storage_writer=FileSystemWriter(folder),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
