"""FLOPs, parameters and message bytes of every unit of the chain, from sizes alone (reference performance section 2).

Two FLOPs per multiply-add; norms, softmax, embeddings and element-wise work are not counted. Symbols: s encoder and t
decoder positions, h width, p width of all heads, f feed-forward width, v vocabulary, n masked slots, m target slots.

FLOPs balance a pipeline, so that its layout depends on the model alone. `UnitCost.work` predicts times: FLOPs of a
microbatch and, for embeddings and heads, the bytes they move beside their products, as the FLOPs that a device does
meanwhile. In layers such bytes go with the FLOPs.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_metro.config.chain import Network, Unit, build_chain
from megatron_metro.config.errors import ConfigError
from megatron_metro.config.lengths import Lengths, mean_lengths
from megatron_metro.config.network_sizes import NetworkSizes, has_projected_embedding, network_sizes, rtd_head_width
from megatron_metro.config.payload import payload_rows
from megatron_metro.config.schema import ModelConfig, RunConfig

BACKWARD_OVER_FORWARD = 2  # gradients of inputs and of weights: one matrix product each
CAUSAL_SHARE = 0.5  # of the score matrix that a causal kernel computes
FIRST_POSITION_ROW = 2  # rows of a position table before the first position (reference section 1.4)

# FLOPs that a device does in a layer while it moves a byte, by bytes per number. BF16: an H100, 600 TFLOP/s at 3.8 TB/s
# (reference performance section 1c). FP32: a core of an AMD Zen 5; tools/benchmark.py pipeline fits 5.9 at a vocabulary
# of 8,192 tokens and 5.0 at 32,768.
FLOPS_PER_BYTE = {2: 158.0, 4: 5.4}
# Times that a tensor is written or read over, forward and backward.
TOKEN_GRADIENT_PASSES = 4  # of every use of the token matrix: a dense gradient is written, and added to the main one
LOGIT_PASSES = 10  # output bias, maximum, exponentials, chunk sums; in the backward pass softmax and difference
ROW_PASSES = 10  # of [s, b, h] in an embedding and in the RTD head: lookup, positions, norm and their gradients


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitCost:
    """What one unit costs per sequence and what a boundary after it sends."""

    unit: Unit
    forward_flops: float  # per sequence, where the next unit is in the same piece
    extra_flops_if_cut: float  # on top of them, where the chain is cut after it
    parameters: int  # the weights it reads; shared ones appear at every reader
    bytes_sent: int  # per microbatch, were the chain cut after it; 0 after the last unit
    work: float  # per microbatch, forward and backward, in FLOPs
    extra_work_if_cut: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageFormat:
    """What else fixes the bytes of a message: sequences, bytes per number, shards of the sequence."""

    micro_batch_size: int = 1
    element_size: int = 4
    sequence_shards: int = 1


def unit_costs(model: ModelConfig, lengths: Lengths, message: MessageFormat | None = None) -> tuple[UnitCost, ...]:
    """Costs of all units in order, as the model is built, from the whole slot counts of `static_lengths`.

    A last layer in one piece with its head runs at the head's slots only, if sequence parallelism can shard these.
    """
    message = message if message is not None else MessageFormat()
    costs, chain = [], build_chain(model)
    for unit in chain:
        whole = forward_flops(unit, model, lengths, every_position=True)
        shortened = forward_flops(unit, model, lengths)
        num_slots = lengths.masked if unit.network == "generator" else lengths.targets
        flops = shortened if round(num_slots) % message.sequence_shards == 0 else whole
        passes = (1 + BACKWARD_OVER_FORWARD) * message.micro_batch_size
        moved = _numbers_moved(unit, model, lengths, message.micro_batch_size) * message.element_size
        costs.append(
            UnitCost(
                unit=unit,
                forward_flops=flops,
                extra_flops_if_cut=whole - flops,
                parameters=count_parameters([unit], model),
                bytes_sent=0 if unit == chain[-1] else message_bytes(unit, model, lengths, message),
                work=passes * flops + FLOPS_PER_BYTE[message.element_size] * moved,
                extra_work_if_cut=passes * (whole - flops),
            )
        )
    return tuple(costs)


def message_bytes(unit: Unit, model: ModelConfig, lengths: Lengths, message: MessageFormat) -> int:
    """Bytes each tensor-parallel rank sends after a piece that ends with `unit`, per microbatch and direction."""
    rows = payload_rows(
        unit,
        model,
        encoder_length=lengths.encoder,
        decoder_length=lengths.decoder,
        num_masked_slots=round(lengths.masked),
        sequence_shards=message.sequence_shards,
    )
    return rows.total * message.micro_batch_size * rows.width * message.element_size


def training_flops(model: ModelConfig, lengths: Lengths, *, every_position: bool = False) -> float:
    """FLOPs of forward and backward of one sequence, without recomputation; `every_position` as in `forward_flops`.

    Without it they are what is built and the least that the mathematics needs: the count behind MFU.
    """
    forward = sum(forward_flops(unit, model, lengths, every_position=every_position) for unit in build_chain(model))
    return forward * (1 + BACKWARD_OVER_FORWARD)


def step_flops(config: RunConfig, global_batch_size: int) -> float:
    """FLOPs of a whole training step, over all devices: what throughput and MFU are counted with."""
    return training_flops(config.model, mean_lengths(config)) * global_batch_size


def forward_flops(unit: Unit, model: ModelConfig, lengths: Lengths, *, every_position: bool = False) -> float:
    """Forward FLOPs of one unit for one sequence.

    The last generator and decoder layers have queries at the slots of their heads only; with `every_position` they run
    like all other layers, as where the chain is cut before the head.
    """
    h, s = model.hidden_size, lengths.encoder
    match unit.kind:
        case "generator_embedding":
            return 2.0 * s * _embedding_projection(model)
        case "generator_layer":
            is_short = unit.index == model.generator_num_layers - 1 and not every_position
            sizes = network_sizes(model, "generator")
            return _encoder_layer_flops(model, sizes, s, min(lengths.masked, s) if is_short else s)
        case "mlm_head":
            return 2 * lengths.masked * (_mlm_dense(model) + _mlm_width(model) * vocabulary(model))
        case "encoder_layer":
            return _encoder_layer_flops(model, network_sizes(model, "encoder"), s, s)
        case "encoder_head":
            return _verdict_flops(model, s) if model.has_encoder_rtd_head else 0.0
        case "decoder_layer":
            is_last = unit.index == model.decoder_num_layers - 1
            is_short = is_last and not every_position and not model.has_decoder_rtd_head
            t = lengths.decoder
            return _decoder_layer_flops(model, lengths, min(lengths.targets, t) if is_short else t)
        case "lm_head":
            verdicts = _verdict_flops(model, lengths.decoder) if model.has_decoder_rtd_head else 0.0
            return 2 * lengths.targets * (h * vocabulary(model) + _lm_dense(model)) + verdicts
        case _:
            return 0.0


def _numbers_moved(unit: Unit, model: ModelConfig, lengths: Lengths, micro_batch_size: int) -> float:
    """Numbers that an embedding or a head moves in a microbatch besides its products; 0 for layers."""
    h, v = model.hidden_size, vocabulary(model)
    gradient = TOKEN_GRADIENT_PASSES * v * h
    mlm_gradient = TOKEN_GRADIENT_PASSES * v * _mlm_width(model)
    rows = ROW_PASSES * micro_batch_size * h
    logits = LOGIT_PASSES * micro_batch_size * v
    match unit.kind:
        case "generator_embedding" | "encoder_embedding":
            return gradient + rows * lengths.encoder
        case "mlm_head":  # projects to the vocabulary, and looks up the encoder's input
            return mlm_gradient + gradient + logits * lengths.masked + rows * lengths.encoder
        case "encoder_head":
            return rows * lengths.encoder if model.has_encoder_rtd_head else 0.0
        case "decoder_embedding":
            return gradient + rows * lengths.decoder
        case "lm_head":
            verdicts = rows * lengths.decoder if model.has_decoder_rtd_head else 0.0
            return gradient + logits * lengths.targets + verdicts
        case _:
            return 0.0


def _encoder_layer_flops(model: ModelConfig, sizes: NetworkSizes, s: int, queries: float) -> float:
    """A layer that sees `s` positions and computes its output at `queries` of them: 24 s h^2 + 4 s^2 h when all."""
    h, p = sizes.hidden_size, sizes.heads_width
    keys_and_values, query_and_output = 4 * s * h * p, 4 * queries * h * p
    return keys_and_values + query_and_output + 4 * queries * s * p + _feed_forward_flops(model, sizes, queries)


def _decoder_layer_flops(model: ModelConfig, lengths: Lengths, queries: float) -> float:
    """28 t h^2 + 4 s h^2 + 4 c t^2 h + 4 s t h when all positions are queries."""
    sizes = network_sizes(model, "decoder")
    h, p, s, t = sizes.hidden_size, sizes.heads_width, lengths.encoder, lengths.decoder
    self_attention = 4 * t * h * p + 4 * queries * h * p + 4 * CAUSAL_SHARE * queries * t * p
    cross_attention = 4 * s * h * p + 4 * queries * h * p + 4 * queries * s * p
    return self_attention + cross_attention + _feed_forward_flops(model, sizes, queries)


def _feed_forward_flops(model: ModelConfig, sizes: NetworkSizes, positions: float) -> float:
    num_matrices = 3 if model.activation == "gated-gelu" else 2
    return 2 * num_matrices * positions * sizes.hidden_size * sizes.ffn_hidden_size


def count_parameters(units: Iterable[Unit], model: ModelConfig) -> int:
    """Parameters of a piece (or of the whole chain): a weight that several of the units read counts once."""
    weights: dict[str, int] = {}
    for unit in units:
        weights |= unit_weights(unit, model)
    return sum(weights.values())


def main_model(model: ModelConfig) -> ModelConfig:
    """The encoder-decoder alone: what is released after pretraining."""
    return replace(model, generator_num_layers=0)


def unit_weights(unit: Unit, model: ModelConfig) -> dict[str, int]:
    """Sizes of the weights a unit reads, unpadded and before tensor parallelism.

    Shared weights bear their checkpoint name; the others are summed under the unit's own name.
    """
    words = {"word_embeddings.weight": vocabulary(model) * model.hidden_size}
    match unit.kind:
        case "generator_embedding":
            shares = model.generator_embedding_sharing == "token_pos_norm"
            projection = {str(unit): _embedding_projection(model)}
            return words | _embedding_weights("encoder" if shares else "generator", model) | projection
        case "encoder_embedding":
            return words | _embedding_weights("encoder", model)
        case "decoder_embedding":
            return words | _embedding_weights("decoder", model)
        case "mlm_head":
            own = _mlm_head(model) + _final_norm(model, "generator")
            return words | _embedding_weights("encoder", model) | {str(unit): own}
        case "encoder_head":
            rtd_head = _rtd_head(model) if model.has_encoder_rtd_head else 0
            return {str(unit): _final_norm(model, "encoder") + rtd_head}
        case "lm_head":
            if model.untie_embeddings_and_output_weights:
                words = {"lm_head.weight": vocabulary(model) * model.hidden_size}
            return words | {str(unit): _lm_head(model)}
        case _:
            return _layer_weights(unit, model)


def _embedding_weights(network: str, model: ModelConfig) -> dict[str, int]:
    weights = {}
    if model.position_embedding_type == "learned_absolute":
        rows = model.max_position_embeddings + FIRST_POSITION_ROW
        weights[f"{network}.position_embeddings.weight"] = rows * model.hidden_size
    if model.norm_placement == "post":
        weights[f"{network}.embedding_norm"] = _norm(model, model.hidden_size)
    return weights


def _layer_weights(unit: Unit, model: ModelConfig) -> dict[str, int]:
    sizes, bias = network_sizes(model, unit.network), model.add_bias_linear
    h, f, p = sizes.hidden_size, sizes.ffn_hidden_size, sizes.heads_width
    is_decoder = unit.kind == "decoder_layer"
    attention = 4 * h * p + (3 * p + h if bias else 0)
    inner = 2 * f if model.activation == "gated-gelu" else f
    feed_forward = inner * h + f * h + (inner + h if bias else 0)
    own = (2 if is_decoder else 1) * attention + feed_forward + (3 if is_decoder else 2) * _norm(model, h)
    table = model.relative_attention_num_buckets * sizes.num_attention_heads
    has_bias = model.relative_attention_decoder or not is_decoder
    if has_bias and model.relative_attention == "per_layer":
        own += table
    weights = {str(unit): own}
    if has_bias and model.relative_attention == "per_stack":
        weights[f"{unit.network}.relative_bias.weight"] = table
    return weights


def _embedding_projection(model: ModelConfig) -> int:
    """Weights between embeddings and a generator of another width."""
    generator = network_sizes(model, "generator")
    return model.hidden_size * generator.hidden_size if has_projected_embedding(model) else 0


def _mlm_width(model: ModelConfig) -> int:
    """Width of the vocabulary matrix of the MLM head: its own, or the model's."""
    return network_sizes(model, "generator").hidden_size if model.untie_mlm_head else model.hidden_size


def _mlm_dense(model: ModelConfig) -> int:
    """Weights of the MLM head before its vocabulary matrix, without bias: a dense layer or a bare projection."""
    h = network_sizes(model, "generator").hidden_size
    return h * _mlm_width(model) if model.mlm_head == "roberta" or h != _mlm_width(model) else 0


def _mlm_head(model: ModelConfig) -> int:
    width = _mlm_width(model)
    bias_and_norm = width + _norm(model, width) if model.mlm_head == "roberta" else 0
    matrix = vocabulary(model) * width if model.untie_mlm_head else 0
    return _mlm_dense(model) + bias_and_norm + matrix + vocabulary(model)


def _rtd_dense(model: ModelConfig) -> int:
    """Weights of the RTD head before its last layer, without bias."""
    return 0 if model.rtd_head == "simple" else model.hidden_size * rtd_head_width(model)


def _lm_dense(model: ModelConfig) -> int:
    """Weights of the LM head beside its vocabulary matrix, without biases."""
    return model.hidden_size**2 if model.lm_head == "roberta" else 0


def _lm_head(model: ModelConfig) -> int:
    """What the LM head's unit holds beside the vocabulary matrix."""
    biases = 0 if model.lm_head == "linear" else vocabulary(model)
    if model.lm_head == "roberta":
        biases += model.hidden_size + _norm(model, model.hidden_size)
    final_norm = _final_norm(model, "decoder") if model.has_decoder else 0
    return _lm_dense(model) + biases + final_norm + (_rtd_head(model) if model.has_decoder_rtd_head else 0)


def _verdict_flops(model: ModelConfig, num_positions: int) -> float:
    return 2.0 * num_positions * (_rtd_dense(model) + rtd_head_width(model))


def _rtd_head(model: ModelConfig) -> int:
    width = rtd_head_width(model)
    bias = 0 if model.rtd_head == "simple" else width
    norm = _norm(model, width) if model.rtd_head == "roberta" else 0
    return _rtd_dense(model) + bias + norm + width + 1


def _norm(model: ModelConfig, width: int) -> int:
    return width * (2 if model.normalization == "LayerNorm" else 1)


def _final_norm(model: ModelConfig, network: Network) -> int:
    return _norm(model, network_sizes(model, network).hidden_size) if model.norm_placement == "pre" else 0


def vocabulary(model: ModelConfig) -> int:
    """Rows of the token matrix, which must be resolved."""
    if model.vocab_size is None:
        raise ConfigError("--vocab-size is not given and no tokenizer is loaded; give --vocab-size to count costs")
    return model.vocab_size
