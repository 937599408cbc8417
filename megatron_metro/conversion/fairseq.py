"""METRO's own pretraining checkpoints, generator and RTD head included (reference section 8.3): import only.

The file's `cfg` is not needed: tables and matrices say how many layers, heads and buckets there are and what the
generator shares. What they do not say is the distance from which positions share a bucket. METRO trained 32 buckets
with 128 and 128 buckets with 256; that is taken unless --relative-attention-max-distance says otherwise.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_metro.checkpoint.state_file import StateFile
from megatron_metro.config.errors import CheckpointError
from megatron_metro.config.fields import Value
from megatron_metro.config.presets import PRESETS
from megatron_metro.config.schema import ModelConfig, RunConfig
from megatron_metro.conversion.foreign import complete_run
from megatron_metro.conversion.hf_bart import name_layer
from megatron_metro.conversion.hf_metro_t0 import LARGE_BUCKETS, PUBLISHED_DISTANCE, TRAINED_DISTANCE
from megatron_metro.conversion.mapping import Rule, copies
from megatron_metro.conversion.tokenizer_files import open_tokenizer, read_tokenizer
from megatron_metro.conversion.weights import MappedWeights, Source, TensorFile, have_same_bits
from megatron_metro.model.weights import FIRST_POSITION_ROW

LOGGER = logging.getLogger(__name__)

NAME = "fairseq"
_LAST = "checkpoint_last.pt"
_MODEL = "model."  # beside it stand the optimizer's state and what the run was
_GENERATOR = "generator.sentence_encoder"
_WORDS = "encoder.embed_tokens.weight"
_COPIES = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")
_GENERATOR_COPIES = (f"{_GENERATOR}.embed_tokens.weight", "generator.lm_head.weight")
_VERSIONS = ("encoder.version", "decoder.version", f"{_GENERATOR}.version")
_KINDS = ("weight", "bias")
_DISTANCES = {32: 128, LARGE_BUCKETS: TRAINED_DISTANCE}


class FairseqWeights:
    """The tensors of the model in a checkpoint, without those of the optimizer."""

    def __init__(self, file: StateFile) -> None:
        self._file = file
        self._names = tuple(name.removeprefix(_MODEL) for name in file.names() if name.startswith(_MODEL))

    def names(self) -> tuple[str, ...]:
        """All of the model."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of `names`."""
        return self._file.shape(_MODEL + name)

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._file.dtype(_MODEL + name)

    def read(self, name: str) -> Tensor:
        """The tensor in new memory."""
        return self._file.read(_MODEL + name)


def read_file(path: Path, settings: Mapping[str, Value]) -> Source:
    """The model of a checkpoint file, or of checkpoint_last.pt in a folder; `settings` win over what it says.

    Raises CheckpointError, UnsafeError where the file asks for anything that would run code, ConfigError.
    """
    file = path / _LAST if path.is_dir() else path
    tensors = FairseqWeights(StateFile(file))
    run = _read_run(tensors, file)
    run = complete_run(replace(run, tokenizer=read_tokenizer(file.parent, run.tokenizer)), settings)
    if run.model.relative_attention_num_buckets == LARGE_BUCKETS:
        LOGGER.warning(
            "%s: takes --relative-attention-max-distance %d (trained: %d; the published configurations say %d)",
            *(file, run.model.relative_attention_max_distance, TRAINED_DISTANCE, PUBLISHED_DISTANCE),
        )
    weights = MappedWeights(tensors, name_weights(run.model), run.model, file, _VERSIONS)
    return Source(run=run, weights=weights, place=file, tokenizer=open_tokenizer(run))


def _read_run(tensors: FairseqWeights, file: Path) -> RunConfig:
    """The run that names and shapes describe."""

    def shape(name: str) -> tuple[int, int]:
        if name not in tensors.names() or len(found := tensors.shape(name)) != 2:
            raise CheckpointError(
                f"{file}: has no matrix {_MODEL}{name}; give a METRO pretraining checkpoint of fairseq"
            )
        return found[0], found[1]

    vocab_size, hidden_size = shape(_WORDS)
    num_buckets, num_heads = shape("encoder.layers.0.self_attn_rel_pos.rel_attn_bias.weight")
    ffn_size, _ = shape("encoder.layers.0.fc1.weight")
    heads_width, _ = shape("encoder.layers.0.self_attn.q_proj.weight")
    positions = shape("encoder.embed_positions.weight")[0] - FIRST_POSITION_ROW
    depths = {network: _count_layers(tensors, prefix) for network, prefix in _list_networks().items()}
    preset = PRESETS["metro-base" if depths["generator"] else "t5-metro-base"]()
    if num_heads == 0 or heads_width % num_heads or positions < 1:
        raise CheckpointError(f"{file}: has {num_heads} heads of {heads_width} columns together, {positions} positions")
    model = replace(
        preset.model,
        generator_num_layers=depths["generator"],
        encoder_num_layers=depths["encoder"],
        decoder_num_layers=depths["decoder"],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_size,
        num_attention_heads=num_heads,
        kv_channels=heads_width // num_heads,
        max_position_embeddings=positions,
        relative_attention_num_buckets=num_buckets,
        relative_attention_max_distance=_DISTANCES.get(num_buckets, PUBLISHED_DISTANCE),
        rtd_head=_find_rtd_head(tensors),
        generator_embedding_sharing="token_pos_norm" if _shares_positions(tensors) else "token",
    )
    if depths["generator"]:
        model = replace(model, generator_ffn_hidden_size=shape(f"{_GENERATOR}.layers.0.fc1.weight")[0])
    length = min(preset.data.encoder_seq_length, positions)
    objective = replace(preset.objective, objective="metro")
    return replace(preset, model=model, objective=objective, data=replace(preset.data, encoder_seq_length=length))


def _list_networks() -> dict[str, str]:
    """Our names of the networks and theirs."""
    return {"generator": _GENERATOR, "encoder": "encoder", "decoder": "decoder"}


def _count_layers(tensors: TensorFile, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.layers\.(\d{1,5})\.")
    found = {int(match[1]) for match in map(pattern.match, tensors.names()) if match}
    return max(found, default=-1) + 1


def _find_rtd_head(tensors: TensorFile) -> Literal["none", "roberta", "simple"]:
    if "rtd_head.weight" not in tensors.names():
        return "none"
    return "roberta" if "rtd_head.dense.weight" in tensors.names() else "simple"


def _shares_positions(tensors: TensorFile) -> bool:
    """Whether the generator's positions and embedding norm are the encoder's (base++) rather than its own."""
    for name in _shared_in_base_plus_plus():
        if f"{_GENERATOR}.{name}" not in tensors.names():
            return False
        if not have_same_bits(tensors.read(f"{_GENERATOR}.{name}"), tensors.read(f"encoder.{name}")):
            return False
    return True


def _shared_in_base_plus_plus() -> list[str]:
    return ["embed_positions.weight", *(f"layernorm_embedding.{kind}" for kind in _KINDS)]


def name_weights(model: ModelConfig) -> list[Rule]:
    """Our weights of the whole model as a fairseq METRO's."""
    words = (*_COPIES, *(_GENERATOR_COPIES if model.has_generator else ()))
    rules = [Rule(ours="word_embeddings.weight", theirs=(_WORDS,), copies=words)]
    shares = model.has_generator and model.generator_embedding_sharing == "token_pos_norm"
    for network, prefix in _list_networks().items():
        depth = getattr(model, f"{network}_num_layers")
        if depth and not (network == "generator" and shares):
            ours = (f"{network}.position_embeddings.weight", *(f"{network}.embedding_norm.{kind}" for kind in _KINDS))
            for name, other in zip(ours, _shared_in_base_plus_plus(), strict=True):
                again = (f"{_GENERATOR}.{other}",) if network == "encoder" and shares else ()
                rules.append(Rule(ours=name, theirs=(f"{prefix}.{other}",), copies=again))
        for i in range(depth):
            rules += name_layer(model.head_size, f"{network}.layers.{i}", f"{prefix}.layers.{i}")
            if network != "decoder":
                table = f"{prefix}.layers.{i}.self_attn_rel_pos.rel_attn_bias.weight"
                rules += copies({f"{network}.layers.{i}.relative_bias.weight": table})
    return rules + (_name_heads(model) if model.has_generator else [])


def _name_heads(model: ModelConfig) -> list[Rule]:
    table = {"mlm_head.output_bias": "generator.lm_head.bias"}
    for kind in _KINDS:
        table[f"mlm_head.dense.{kind}"] = f"generator.lm_head.dense.{kind}"
        table[f"mlm_head.norm.{kind}"] = f"generator.lm_head.layer_norm.{kind}"
        if model.rtd_head != "none":
            table[f"rtd_head.output.{kind}"] = f"rtd_head.{kind}"
        if model.rtd_head == "roberta":
            table[f"rtd_head.dense.{kind}"] = f"rtd_head.dense.{kind}"
            table[f"rtd_head.norm.{kind}"] = f"rtd_head.layer_norm.{kind}"
    return copies(table)
