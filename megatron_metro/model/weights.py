"""The weights of a model: names, shapes, and what a name says about rows: the vocabulary's, or lying side by side.

Initialisation, checkpoints and whoever gathers or cuts a weight must agree on them.
"""

from megatron_metro.analysis.cost import FIRST_POSITION_ROW
from megatron_metro.config.chain import Network
from megatron_metro.config.network_sizes import NetworkSizes, has_projected_embedding, network_sizes, rtd_head_width
from megatron_metro.config.schema import ModelConfig

VOCABULARY_ROWS = (
    "word_embeddings.weight",
    "lm_head.weight",
    "lm_transform.output_bias",
    "mlm_head.output.weight",
    "mlm_head.output_bias",
)


def has_vocabulary_rows(name: str) -> bool:
    """Whether a row is a token's, so that rows beyond the vocabulary are padding: zero, and in no checkpoint."""
    return name in VOCABULARY_ROWS


def count_parts(name: str, model: ModelConfig) -> int:
    """Matrices of equal size that a weight holds one above the other, of each of which a rank has its share.

    A gated feed-forward layer's first weight holds the gates and then the values; all others are one matrix.
    """
    return 2 if model.activation == "gated-gelu" and ".linear_fc1." in name else 1


def weight_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the whole model by its name in checkpoints, with its shape there: nothing padded, nothing cut.

    The vocabulary must be resolved. This is arithmetic, so that a model need not be built to know what it consists of.
    """
    assert model.vocab_size is not None
    shapes: dict[str, tuple[int, ...]] = {"word_embeddings.weight": (model.vocab_size, model.hidden_size)}
    depths: dict[Network, int] = {
        "generator": model.generator_num_layers,
        "encoder": model.encoder_num_layers,
        "decoder": model.decoder_num_layers,
    }
    for network, depth in depths.items():
        if depth > 0:
            shapes |= _network_shapes(network, depth, model)
    if model.has_generator:
        shapes |= _mlm_head_shapes(model)
    if model.has_rtd_head:
        shapes |= _rtd_head_shapes(model)
    return shapes | (_lm_head_shapes(model) if model.has_lm_head else {})


def _network_shapes(network: Network, depth: int, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    sizes, h = network_sizes(model, network), model.hidden_size
    table = (model.relative_attention_num_buckets, sizes.num_attention_heads)
    has_bias = network != "decoder" or model.relative_attention_decoder
    shapes: dict[str, tuple[int, ...]] = {}
    if has_bias and model.relative_attention == "per_stack":
        shapes[f"{network}.relative_bias.weight"] = table
    if network != "generator" or model.generator_embedding_sharing == "token":
        if model.position_embedding_type == "learned_absolute":
            shapes[f"{network}.position_embeddings.weight"] = (model.max_position_embeddings + FIRST_POSITION_ROW, h)
        if model.norm_placement == "post":
            shapes |= _norm(f"{network}.embedding_norm", h, model)
    if network == "generator" and has_projected_embedding(model):
        shapes["generator.embedding_projection.weight"] = (sizes.hidden_size, h)
    for i in range(depth):
        layer = f"{network}.layers.{i}"
        shapes |= _layer_shapes(layer, sizes, model, is_decoder=network == "decoder")
        if has_bias and model.relative_attention == "per_layer":
            shapes[f"{layer}.relative_bias.weight"] = table
    return shapes | (_norm(f"{network}.final_norm", sizes.hidden_size, model) if model.norm_placement == "pre" else {})


def _layer_shapes(
    layer: str, sizes: NetworkSizes, model: ModelConfig, *, is_decoder: bool
) -> dict[str, tuple[int, ...]]:
    h, p, f, has_bias = sizes.hidden_size, sizes.heads_width, sizes.ffn_hidden_size, model.add_bias_linear
    linears = {"self_attention.linear_qkv": (3 * p, h), "self_attention.linear_proj": (h, p)}
    if is_decoder:
        linears |= {"cross_attention.linear_q": (p, h), "cross_attention.linear_kv": (2 * p, h)}
        linears["cross_attention.linear_proj"] = (h, p)
    linears |= {"mlp.linear_fc1": ((2 * f if model.activation == "gated-gelu" else f), h), "mlp.linear_fc2": (h, f)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in linears.items():
        shapes |= _linear(f"{layer}.{name}", rows, columns, has_bias=has_bias)
    for name in ("self_attention_norm", "cross_attention_norm", "mlp_norm")[:: 1 if is_decoder else 2]:
        shapes |= _norm(f"{layer}.{name}", h, model)
    return shapes


def _mlm_head_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    assert model.vocab_size is not None
    h = network_sizes(model, "generator").hidden_size
    width = h if model.untie_mlm_head else model.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"mlm_head.output_bias": (model.vocab_size,)}
    if model.mlm_head == "roberta":
        shapes |= _linear("mlm_head.dense", width, h) | _norm("mlm_head.norm", width, model)
    elif width != h:
        shapes["mlm_head.projection.weight"] = (width, h)
    return shapes | ({"mlm_head.output.weight": (model.vocab_size, width)} if model.untie_mlm_head else {})


def _rtd_head_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    width = rtd_head_width(model)
    shapes = _linear("rtd_head.output", 1, width)
    if model.rtd_head != "simple":
        shapes |= _linear("rtd_head.dense", width, model.hidden_size)
    return shapes | (_norm("rtd_head.norm", width, model) if model.rtd_head == "roberta" else {})


def _lm_head_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    assert model.vocab_size is not None
    h, shapes = model.hidden_size, dict[str, tuple[int, ...]]()
    if model.untie_embeddings_and_output_weights:
        shapes["lm_head.weight"] = (model.vocab_size, h)
    if model.lm_head == "roberta":
        shapes |= _linear("lm_transform.dense", h, h) | _norm("lm_transform.norm", h, model)
    return shapes | ({"lm_transform.output_bias": (model.vocab_size,)} if model.lm_head != "linear" else {})


def _linear(name: str, rows: int, columns: int, *, has_bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if has_bias else {})


def _norm(name: str, width: int, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    kinds = ("weight", "bias") if model.normalization == "LayerNorm" else ("weight",)
    return {f"{name}.{kind}": (width,) for kind in kinds}
