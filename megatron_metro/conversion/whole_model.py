"""A whole model in one process, from a step that any layout saved."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from megatron_metro.analysis.cost import count_parameters
from megatron_metro.checkpoint.folder import find_step
from megatron_metro.checkpoint.reader import StepReader, open_step
from megatron_metro.checkpoint.start import list_saved_settings
from megatron_metro.config.chain import build_chain
from megatron_metro.config.errors import CheckpointError, ConfigError
from megatron_metro.config.fields import change_values
from megatron_metro.config.schema import CheckpointConfig, ParallelConfig, RunConfig
from megatron_metro.config.validation import validate
from megatron_metro.device import activate
from megatron_metro.model.build import build_pieces
from megatron_metro.model.piece import ChainPiece
from megatron_metro.model.weights import has_vocabulary_rows
from megatron_metro.parallel.groups import single_process
from megatron_metro.parallel.layout import single_piece
from megatron_metro.tokenizer import Tokenizer, load_tokenizer


def load_model(
    folder: str | Path,
    step: int | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    device: Literal["auto", "cuda", "cpu"] = "auto",
) -> ChainPiece:
    """The whole chain of a saved run in FP32 and evaluation mode, without optimizer state.

    `folder` is a run's --save folder, which may be in use; `step` an iteration of it, the newest when not given. The
    configuration is the one recorded in the step; `tokenizer`, which says what is padding, is found by its path there
    when not given. Nothing else has to be started first; the process then has the groups of a layout of one rank, so a
    process that trains at another layout cannot call this. At most one tensor is in memory twice.

    Raises CheckpointError where the step is missing, damaged or not what its configuration says, UnsafeError where a
    file asks for anything that would run code, DataError where the tokenizer is missing.
    """
    found = find_step(CheckpointConfig(load=str(folder), ckpt_step=step, exit_on_missing_checkpoint=True))
    assert found is not None, "find_step raises where there is none"
    reader = open_step(found)
    run = read_run(reader)
    tokenizer = tokenizer or load_tokenizer(run.tokenizer, run.model.vocab_size)
    place = activate(device)
    groups = single_process(place)
    [piece] = build_pieces(run, single_piece(build_chain(run.model)), groups, torch.float32, tokenizer.pad_id)
    fill_piece(piece, reader)
    return piece.to(place.torch_device).eval()


def read_run(reader: StepReader) -> RunConfig:
    """The recorded run, for one process; its model is known to fit the tensors of the step.

    Raises CheckpointError.
    """
    try:
        run = change_values(RunConfig(), list_saved_settings(reader.document))
        training = replace(run.training, global_batch_size=None, rampup_batch_size=(), micro_batch_size=1)
        run = replace(run, parallel=ParallelConfig(), checkpoint=CheckpointConfig(), training=training)
        validate(run, 1)
    except ConfigError as error:
        raise CheckpointError(
            f"{reader.folder}: its configuration is damaged ({error}); choose another step"
        ) from error
    # A configuration says how much memory is taken before a tensor is read, so it must not say more than there is.
    model, names = run.model, reader.weight_names()
    layers = model.encoder_num_layers + model.decoder_num_layers + model.generator_num_layers
    stored = sum(torch.Size(reader.shape(name)).numel() for name in names)
    if layers > len(names) or model.vocab_size is None or count_parameters(build_chain(model), model) != stored:
        raise CheckpointError(
            f"{reader.folder}: its configuration describes another model than its {len(names)} tensors of {stored} "
            "parameters; choose another step"
        )
    return run


def fill_piece(piece: ChainPiece, reader: StepReader) -> None:
    """Read every weight of a whole chain; rows that pad the vocabulary stay zero. Raises CheckpointError."""
    parameters = dict(piece.named_parameters())
    names = set(reader.weight_names())
    if different := sorted(names ^ parameters.keys()):
        holder, other = ("the step", "its model") if different[0] in names else ("the model", "its step")
        raise CheckpointError(f"{reader.folder}: {holder} has {different[0]} and {other} has not; choose another step")
    for name, parameter in parameters.items():
        rows = parameter.detach()
        if has_vocabulary_rows(name):
            rows = rows[: piece.context.shard.vocab_size]
        if reader.shape(name) != tuple(rows.shape):
            raise CheckpointError(
                f"{reader.folder}: {name} has shape {reader.shape(name)}, its model {tuple(rows.shape)}; "
                "choose another step"
            )
        reader.read_box(name, (0,) * rows.dim(), rows)
