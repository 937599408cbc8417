"""Whether a converted model computes what the original does: logits of both on random inputs, in FP32 on the CPU.

Ours run here. The other side runs in the program it belongs to: transformers' classes, or megatron-core's T5. There is
no fairseq to install, so its main model runs as the `fairseq_t5` that METRO's authors converted it to, by their table.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_metro.analysis.cost import main_model
from megatron_metro.checkpoint.state_file import StateFile
from megatron_metro.config.chain import build_chain
from megatron_metro.config.errors import CheckpointError, ConfigError
from megatron_metro.conversion import fairseq, hf_metro_t0, megatron_lm_t5
from megatron_metro.conversion.convert import OWN, Side
from megatron_metro.conversion.weights import Source
from megatron_metro.device import activate
from megatron_metro.model.build import build_pieces
from megatron_metro.model.core_t5 import build_core_t5, run_core_t5
from megatron_metro.model.weights import has_vocabulary_rows
from megatron_metro.parallel.groups import single_process
from megatron_metro.parallel.layout import single_piece

TOLERANCE = 1e-5  # of logits up to 1; of larger ones, relative to the largest
_SEED = 1234
_LENGTH, _DECODER_LENGTH = 24, 12
_FIRST_ID = 5  # those before it may be padding, which transformers' METRO finds by its id

Compute = Callable[[Tensor, Tensor], Tensor]  # ids [1, s] and the decoder's [1, t] to logits [1, t, v]

# How METRO's authors renamed a layer's parts (reference section 8.3); {ff} is the number of its last sublayer.
_RENAMED = (
    (r"self_attn\.(q|k|v)_proj", r"layer.0.SelfAttention.\1"),
    (r"self_attn\.out_proj", "layer.0.SelfAttention.o"),
    (r"self_attn_layer_norm", "layer.0.layer_norm"),
    (r"self_attn_rel_pos\.rel_attn_bias", "layer.0.SelfAttention.relative_attention_bias"),
    (r"encoder_attn\.(q|k|v)_proj", r"layer.1.EncDecAttention.\1"),
    (r"encoder_attn\.out_proj", "layer.1.EncDecAttention.o"),
    (r"encoder_attn_layer_norm", "layer.1.layer_norm"),
    (r"fc1", "layer.{ff}.DenseReluDense.wi"),
    (r"fc2", "layer.{ff}.DenseReluDense.wo"),
    (r"final_layer_norm", "layer.{ff}.layer_norm"),
)
_LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(.+)\.(weight|bias)")


@dataclass
class LogitCheck:
    """Compares `num_inputs` random inputs; what was found is `report`, which stands behind a message."""

    num_inputs: int
    report: str = ""

    @torch.no_grad()
    def __call__(self, original: Side, written: Side) -> None:
        """Raise CheckpointError where the logits of the two differ, ConfigError where a package is missing."""
        model = original.model.run.model
        assert model.vocab_size is not None
        generator = torch.Generator().manual_seed(_SEED)
        longest = model.max_position_embeddings if model.position_embedding_type != "none" else _LENGTH
        shapes = [(1, min(length, longest)) for length in (_LENGTH, _DECODER_LENGTH)]
        first_id = min(_FIRST_ID, model.vocab_size - 1)
        inputs = [
            [torch.randint(first_id, model.vocab_size, shape, generator=generator) for shape in shapes]
            for _ in range(self.num_inputs)
        ]
        expected, found = _run(original, inputs), _run(written, inputs)
        worst = max(float((a - b).abs().max()) for a, b in zip(expected, found))
        largest = max(1.0, *(float(logits.abs().max()) for logits in expected))
        difference = f"logits of {self.num_inputs} inputs differ by {worst:.1e} at most, the largest is {largest:.3g}"
        if not worst <= TOLERANCE * largest:
            raise CheckpointError(f"--check-logits: {difference}; convert without it to look at the output")
        self.report = f"; {difference}"


def _run(side: Side, inputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Logits of one side, whose model is let go."""
    compute = open_side(side)
    return [compute(*pair) for pair in inputs]


def open_side(side: Side) -> Compute:
    """What computes the logits of one side. Raises ConfigError where transformers is not installed."""
    if side.form == OWN:
        return _open_own(side.model)
    if side.form == megatron_lm_t5.NAME:
        return _open_core(side)
    if side.form == fairseq.NAME:
        return _open_fairseq(side)
    classes = _import_transformers()
    return _call(classes.AutoModelForSeq2SeqLM.from_pretrained(side.place, dtype=torch.float32).eval())


def _open_own(source: Source) -> Compute:
    run = replace(source.run, model=replace(main_model(source.run.model), rtd_head="none"))
    groups = single_process(activate("cpu"))
    [piece] = build_pieces(run, single_piece(build_chain(run.model)), groups, torch.float32, pad_id=0)
    piece.eval()
    vocab_size = run.model.vocab_size
    for name, parameter in piece.named_parameters():
        rows = parameter.detach()
        (rows[:vocab_size] if has_vocabulary_rows(name) else rows).copy_(source.weights.read(name))

    def compute(tokens: Tensor, decoder_tokens: Tensor) -> Tensor:
        state = piece.start_writing(piece.read_source(tokens, None, None), None)
        hidden_TRH = piece.write(decoder_tokens, None, state)
        return piece.project(hidden_TRH.transpose(0, 1).flatten(0, 1))[None, :, :vocab_size]

    return compute


def _open_core(side: Side) -> Compute:
    """megatron-core's T5 with the tensors of the checkpoint, under the names that its modules have."""
    model = side.model.run.model
    place = activate("cpu")
    core = build_core_t5(model, single_process(place))
    place.seed_all(_SEED)  # core asks for its random states even where nothing is dropped
    tensors = megatron_lm_t5.open_weights(side.place, model.vocab_size)
    state = {}
    for name in tensors.names():
        renamed = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        state[renamed.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")] = tensors.read(name).float()
    _fill(core, megatron_lm_t5.name_twice(state))
    return lambda tokens, decoder_tokens: run_core_t5(core, tokens, decoder_tokens)


def _open_fairseq(side: Side) -> Compute:
    tensors = fairseq.FairseqWeights(StateFile(side.place))
    state = {rename_to_hf(name): tensors.read(name).float() for name in tensors.names() if _is_main(name)}
    state["shared.weight"] = state["encoder.embed_tokens.weight"]
    classes = _import_transformers()
    config = hf_metro_t0.write_config(replace(side.model.run, model=main_model(side.model.run.model)))
    network = classes.FairseqT5ForConditionalGeneration(classes.FairseqT5Config(**config)).eval()
    _fill(network, state)
    return _call(network)


def _is_main(name: str) -> bool:
    return name.startswith(("encoder.", "decoder.")) and not name.endswith(".version")


def rename_to_hf(name: str) -> str:
    """A name of fairseq's main model in the released Hugging Face files."""
    if match := _LAYER.fullmatch(name):
        network, number, part, kind = match.groups()
        for pattern, new in _RENAMED:
            if found := re.fullmatch(pattern, part):
                place = found.expand(new).replace("{ff}", "1" if network == "encoder" else "2")
                return f"{network}.block.{number}.{place}.{kind}"
    name = name.replace("decoder.output_projection.", "lm_head.").replace("embed_positions", "pos_embed")
    return name.replace("layernorm_embedding", "first_layer_norm")


def _fill(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a module its tensors; states of Transformer Engine, which this one has not, may be missing."""
    missing, unexpected = network.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    assert not missing and not unexpected, f"checked by the name table before: {missing} {unexpected}"


def _call(network: nn.Module) -> Compute:
    return lambda tokens, decoder_tokens: network(input_ids=tokens, decoder_input_ids=decoder_tokens).logits


def _import_transformers() -> Any:
    """The module with transformers' classes and METRO's, which keeps its progress bars to itself."""
    try:
        from megatron_metro.conversion import hf  # noqa: PLC0415 (transformers is optional)
    except ImportError as error:
        raise ConfigError("--check-logits needs transformers; install the extra hf, or drop the flag") from error
    hf.logging.disable_progress_bar()
    return hf
