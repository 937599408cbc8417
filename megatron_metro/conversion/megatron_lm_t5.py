"""Megatron-LM's T5 on megatron-core, saved as torch_dist: import only.

Pre-LN with LayerNorm, biases, GELU and final norms; encoder and decoder read one table of learned positions; a tied LM
head has a bias. Layers are one tensor along a first dimension, or one each. Byte items (random states, states of
Transformer Engine) and the pickled arguments are never read, so what tensors do not say is asked for: the number of
attention heads, and the number of ids where rows pad the vocabulary.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_metro.checkpoint.folder import RELEASE, read_tracker, step_folder
from megatron_metro.checkpoint.reader import StepReader
from megatron_metro.checkpoint.tensor_index import INDEX_FILE, read_index
from megatron_metro.config.errors import CheckpointError, ConfigError
from megatron_metro.config.fields import Value
from megatron_metro.config.presets import PRESETS
from megatron_metro.config.schema import ModelConfig, RunConfig
from megatron_metro.conversion.foreign import complete_run
from megatron_metro.conversion.mapping import BelowZeros, Rule, copies
from megatron_metro.conversion.tokenizer_files import open_tokenizer
from megatron_metro.conversion.weights import MappedWeights, Source
from megatron_metro.model.weights import FIRST_POSITION_ROW
from megatron_metro.tokenizer import load_tokenizer

NAME = "megatron-lm-t5"
_WORDS, _POSITIONS = "embedding.word_embeddings.weight", "embedding.position_embeddings.weight"
_HEAD = "lm_head.output_layer"
# Second names under which core's model holds the same tensors.
_POSITIONS_AGAIN, _HEAD_AGAIN = "position_embeddings.weight", "output_layer"
_VOCABULARY_ROWS = (_WORDS, *(f"{name}.{kind}" for name in (_HEAD, _HEAD_AGAIN) for kind in ("weight", "bias")))
_OPTIMIZER = "optimizer."
_STACKED = re.compile(r"(encoder|decoder)\.layers\.(?!\d)(.+)")
_KINDS = ("weight", "bias")


class CoreWeights:
    """The model's tensors in a step of Megatron-LM: one for each layer, and rows of the vocabulary as many as asked."""

    def __init__(self, reader: StepReader, vocab_size: int | None) -> None:
        self._reader, self._vocab_size = reader, vocab_size
        self._places: dict[str, tuple[str, int | None]] = {}  # name to tensor, and to its place in a stack of layers
        for name in reader.names():
            match = _STACKED.fullmatch(name)
            if name.startswith(_OPTIMIZER):
                continue
            if match is None:
                self._places[name] = (name, None)
                continue
            for layer in range((*reader.shape(name), 0)[0]):
                self._places[f"{match[1]}.layers.{layer}.{match[2]}"] = (name, layer)

    def names(self) -> tuple[str, ...]:
        """All of the model, layer by layer."""
        return tuple(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of `names`."""
        stored, layer = self._places[name]
        shape = self._reader.shape(stored)
        if layer is not None:
            return shape[1:]
        if name in _VOCABULARY_ROWS and self._vocab_size is not None:
            return (min(self._vocab_size, shape[0]), *shape[1:])
        return shape

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._reader.dtype(self._places[name][0])

    def read(self, name: str) -> Tensor:
        """The tensor in new memory."""
        stored, layer = self._places[name]
        shape = self.shape(name)
        box = torch.empty(shape if layer is None else (1, *shape), dtype=self.dtype(name))
        self._reader.read_box(stored, (layer or 0, *(0,) * (box.dim() - 1)), box)
        return box if layer is None else box[0]


def read_folder(path: Path, settings: Mapping[str, Value]) -> Source:
    """The model of a run's folder or of one step of it; `settings` say what its tensors do not.

    Raises CheckpointError, UnsafeError where a file asks for anything that would run code, ConfigError where
    --num-attention-heads is not given.
    """
    step = _find_step(path)
    run = _read_run(open_weights(step, None), step, settings)
    tensors = open_weights(step, run.model.vocab_size)
    weights = MappedWeights(tensors, name_weights(run.model), run.model, step)
    return Source(run=run, weights=weights, place=step, tokenizer=open_tokenizer(run))


def open_weights(step: Path, vocab_size: int | None) -> CoreWeights:
    """The model's tensors in a step, with so many rows of the vocabulary, or all.

    Raises CheckpointError, UnsafeError.
    """
    return CoreWeights(StepReader(step, {}, read_index(step, passes_over_bytes=True)), vocab_size)


def name_twice(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What core's module expects of a checkpoint, which may hold positions and LM head under one of their names."""
    pairs = [(_POSITIONS, _POSITIONS_AGAIN), *((f"{_HEAD}.{kind}", f"{_HEAD_AGAIN}.{kind}") for kind in _KINDS)]
    pairs += [(second, first) for first, second in pairs]
    return {**{other: state[name] for name, other in pairs if name in state}, **state}


def _find_step(path: Path) -> Path:
    if (path / INDEX_FILE).exists():
        return path
    tracker = read_tracker(path)
    if tracker is None:
        raise CheckpointError(f"--input {path}: holds neither {INDEX_FILE} nor a tracker; give the folder of a run")
    return path / RELEASE if tracker == RELEASE else step_folder(path, int(tracker))


def _read_run(tensors: CoreWeights, step: Path, settings: Mapping[str, Value]) -> RunConfig:
    """The run that shapes and the user's settings describe."""

    def shape(name: str) -> tuple[int, int]:
        if name not in tensors.names() or len(found := tensors.shape(name)) != 2:
            raise CheckpointError(f"{step}: has no matrix {name}; give a T5 of Megatron-LM's core models")
        return found[0], found[1]

    heads = settings.get("num_attention_heads")
    if not isinstance(heads, int):
        raise ConfigError(f"--num-attention-heads: {step} does not say how many it has; give the number")
    (rows, hidden_size), (positions, _) = shape(_WORDS), shape(_POSITIONS)
    heads_width = shape("encoder.layers.0.self_attention.linear_qkv.weight")[0] // 3
    if heads_width % heads:
        raise ConfigError(
            f"--num-attention-heads {heads} does not divide {heads_width}, the width of all; give another"
        )
    preset = PRESETS["t5-metro-base"]()
    model = replace(
        preset.model,
        vocab_size=rows,
        hidden_size=hidden_size,
        ffn_hidden_size=shape("encoder.layers.0.mlp.linear_fc1.weight")[0],
        kv_channels=heads_width // heads,
        encoder_num_layers=_count_layers(tensors, "encoder"),
        decoder_num_layers=_count_layers(tensors, "decoder"),
        max_position_embeddings=positions,
        relative_attention="none",
        norm_placement="pre",
        activation="gelu",
        untie_embeddings_and_output_weights=f"{_HEAD}.weight" in tensors.names(),
        lm_head="linear-bias" if f"{_HEAD}.bias" in tensors.names() else "linear",
    )
    tokenizer = replace(preset.tokenizer, vocab_extra_ids=100)
    data = replace(preset.data, encoder_seq_length=min(preset.data.encoder_seq_length, positions))
    objective = replace(preset.objective, objective="t5-span")
    run = complete_run(replace(preset, model=model, tokenizer=tokenizer, data=data, objective=objective), settings)
    if "vocab_size" not in settings and run.tokenizer.tokenizer_model is not None:
        size = load_tokenizer(run.tokenizer).vocab_size
        run = complete_run(run, {"vocab_size": min(size, rows)})
    return run


def _count_layers(tensors: CoreWeights, network: str) -> int:
    prefix = f"{network}.layers."
    return max((int(name.split(".")[2]) for name in tensors.names() if name.startswith(prefix)), default=-1) + 1


def name_weights(model: ModelConfig) -> list[Rule]:
    """Our weights as a core T5's; its one table of positions is both of ours, which begin with two unused rows."""
    rules = [Rule(ours="word_embeddings.weight", theirs=(_WORDS,))]
    if model.untie_embeddings_and_output_weights:
        rules.append(_head_rule("lm_head.weight", "weight"))
    if model.lm_head == "linear-bias":
        rules.append(_head_rule("lm_transform.output_bias", "bias"))
    for network, depth in (("encoder", model.encoder_num_layers), ("decoder", model.decoder_num_layers)):
        table, below = f"{network}.position_embeddings.weight", BelowZeros(FIRST_POSITION_ROW)
        rules.append(Rule(ours=table, theirs=(_POSITIONS,), transform=below, copies=(_POSITIONS_AGAIN,)))
        rules += copies({f"{network}.final_norm.{kind}": f"{network}.final_layernorm.{kind}" for kind in _KINDS})
        for i in range(depth):
            rules += _name_layer(f"{network}.layers.{i}", is_decoder=network == "decoder")
    return rules


def _head_rule(ours: str, kind: str) -> Rule:
    return Rule(ours=ours, theirs=(f"{_HEAD}.{kind}",), copies=(f"{_HEAD_AGAIN}.{kind}",))


def _name_layer(layer: str, *, is_decoder: bool) -> list[Rule]:
    """A layer, whose norms core names after the linears that follow them; the linears themselves are core's in ours."""
    linears = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]
    if is_decoder:
        linears += [f"cross_attention.{name}" for name in ("linear_q", "linear_kv", "linear_proj")]
    table = {f"{layer}.{name}.{kind}": f"{layer}.{name}.{kind}" for name in linears for kind in _KINDS}
    for kind in _KINDS:
        table[f"{layer}.self_attention_norm.{kind}"] = f"{layer}.self_attention.linear_qkv.layer_norm_{kind}"
        table[f"{layer}.mlp_norm.{kind}"] = f"{layer}.mlp.linear_fc1.layer_norm_{kind}"
        if is_decoder:
            table[f"{layer}.cross_attention_norm.{kind}"] = f"{layer}.pre_cross_attn_layernorm.{kind}"
    return copies(table)
