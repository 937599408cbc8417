"""A saved run, at any layout of any size, made ready to write."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

from torch import nn

from megatron_metro.analysis.cost import main_model
from megatron_metro.checkpoint.start import read_saved_settings
from megatron_metro.config.errors import ConfigError
from megatron_metro.config.fields import change_values
from megatron_metro.config.model_checks import check_widths
from megatron_metro.config.schema import CheckpointConfig, OptimizerConfig, ParallelConfig, RunConfig
from megatron_metro.device import Device
from megatron_metro.inference.answering import Answerer
from megatron_metro.inference.options import WritingIds, WritingOptions
from megatron_metro.inference.pipeline import EncoderDecoder
from megatron_metro.inference.requests import Reader
from megatron_metro.model.build import build_pieces
from megatron_metro.model.transformer_config import parameter_dtype
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.parallel.stage_plan import plan_layout
from megatron_metro.tokenizer import load_tokenizer

# Fills pieces from `run.checkpoint`, as `training.loading.load_checkpoint` does: (run, pieces, no optimizer, groups).
Fill = Callable[[RunConfig, Sequence[nn.Module], None, ParallelGroups], object]


def read_options(flags: Mapping[str, Any]) -> WritingOptions:
    """How texts are written, from flags by name; raises ConfigError, also where a flag is given that has no use."""
    if (flags["input"] is None) != (flags["output"] is None):
        raise ConfigError("--input and --output: only one is given; give both, or neither to answer line by line")
    return WritingOptions(**{field.name: flags[field.name] for field in fields(WritingOptions)})


def read_saved_run(flags: Mapping[str, Any]) -> RunConfig:
    """The run saved in --load without its generator, to be loaded at the layout of `flags`.

    Raises ConfigError or CheckpointError.
    """
    folder = flags["load"]
    checkpoint = CheckpointConfig(
        load=folder, ckpt_step=flags["ckpt_step"], finetune=True, exit_on_missing_checkpoint=True
    )
    settings, _ = read_saved_settings(checkpoint)
    run = change_values(RunConfig(), settings)
    if not run.model.has_decoder:
        raise ConfigError(f"--load {folder}: is an encoder without a decoder, which writes nothing; name another run")
    limit = run.model.max_position_embeddings
    if run.model.position_embedding_type != "none" and flags["max_new_tokens"] > limit:
        raise ConfigError(f"--max-new-tokens {flags['max_new_tokens']}: the model has {limit} positions; give {limit}")
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    parallel = ParallelConfig(**{name: flags[name] for name in sizes})
    check_widths(run.model, parallel)
    return replace(
        run,
        model=main_model(run.model),
        parallel=parallel,
        optimizer=OptimizerConfig(bf16=flags["precision"] == "bf16"),
        tokenizer=replace(run.tokenizer, tokenizer_model=flags["tokenizer_model"] or run.tokenizer.tokenizer_model),
        checkpoint=checkpoint,
    )


def open_answerer(
    run: RunConfig,
    groups: ParallelGroups,
    device: Device,
    flags: Mapping[str, Any],
    options: WritingOptions,
    fill: Fill,
) -> Answerer:
    """What it takes to answer requests; the saved model is loaded when it is needed.

    Raises ConfigError or DataError, and CheckpointError when it is loaded.
    """
    if groups.dp_size > 1:
        raise ConfigError(
            f"{groups.world_size} processes make {groups.dp_size} replicas, which would all write the same; start "
            f"{groups.world_size // groups.dp_size}, or raise --tensor- or --pipeline-model-parallel-size"
        )
    tokenizer = load_tokenizer(run.tokenizer, run.model.vocab_size)
    limit = None if run.model.position_embedding_type == "none" else run.model.max_position_embeddings
    return Answerer(
        open_model=partial(build_model, run, groups, device, tokenizer.pad_id, fill),
        groups=groups,
        tokenizer=tokenizer,
        ids=WritingIds.of(tokenizer.vocabulary, flags["decoder_start"]),
        options=options,
        reader=Reader(tokenizer=tokenizer, mode=flags["mode"], max_length=limit),
    )


def build_model(run: RunConfig, groups: ParallelGroups, device: Device, pad_id: int, fill: Fill) -> EncoderDecoder:
    """This rank's stage with the saved weights. Raises CheckpointError."""
    layout = plan_layout(run)
    [piece] = build_pieces(run, layout, groups, parameter_dtype(run.optimizer), pad_id)
    piece.to(device.torch_device)
    fill(run, [piece], None, groups)
    return EncoderDecoder(piece, layout, groups)
