"""The cost model against models that are really built: parameters of every piece, names of shared weights, FLOPs."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_metro.analysis.cost import CAUSAL_SHARE, count_parameters, forward_flops
from megatron_metro.config.chain import build_chain
from megatron_metro.config.lengths import static_lengths
from megatron_metro.config.presets import metro_tiny
from megatron_metro.model.weights import has_vocabulary_rows, weight_shapes
from megatron_metro.parallel.layout import balance, shared_weights, single_piece

RUN = metro_tiny()
RUN = replace(RUN, model=replace(RUN.model, vocab_size=640))
VARIANTS = {
    "base": {},
    "base++": {"generator_embedding_sharing": "token_pos_norm"},
    "simple heads": {"rtd_head": "simple", "mlm_head": "linear"},
    "own head matrix": {"untie_embeddings_and_output_weights": True},
    "narrow heads": {"kv_channels": 8},
    "pre-norm generator": {"norm_placement": "pre", "relative_attention": "per_stack"},
    "narrow generator": {
        "generator_hidden_size": 32, "generator_ffn_hidden_size": 96, "generator_num_attention_heads": 2,
        "rtd_head": "gelu", "rtd_head_hidden_size": 80,
    },
    "narrow generator, base++": {
        "generator_hidden_size": 32, "generator_embedding_sharing": "token_pos_norm", "mlm_head": "linear",
        "norm_placement": "post", "kv_channels": 12,
    },
    "wide generator": {"generator_hidden_size": 96, "untie_mlm_head": True, "relative_attention": "per_stack"},
    "SPACTOR": {
        "norm_placement": "pre", "normalization": "RMSNorm", "add_bias_linear": False, "generator_ffn_hidden_size": 96,
        "position_embedding_type": "none", "relative_attention": "per_stack", "relative_attention_decoder": True,
        "mlm_head": "linear", "untie_mlm_head": True, "rtd_head": "gelu", "scale_lm_output": True,
    },
    "RTD on the decoder": {"rtd_position": "decoder", "lm_head": "roberta"},
    "an LM head with a bias": {"lm_head": "linear-bias", "norm_placement": "pre", "activation": "gelu"},
    "copies": {"copy_mechanism": True, "untie_embeddings_and_output_weights": True},
    "pre-norm, RTD on the decoder": {"rtd_position": "decoder", "norm_placement": "pre", "rtd_head": "simple"},
    "electra": {"decoder_num_layers": 0},
    "pre-norm electra": {"decoder_num_layers": 0, "norm_placement": "pre", "relative_attention": "per_stack"},
    "coco-lm": {"decoder_num_layers": 0, "encoder_lm_head": True, "copy_mechanism": True, "lm_head": "roberta"},
    "t5": {
        "generator_num_layers": 0, "position_embedding_type": "none", "norm_placement": "pre",
        "normalization": "RMSNorm", "relative_attention": "per_stack", "relative_attention_decoder": True,
        "relative_attention_bucket": "t5", "add_bias_linear": False, "activation": "gated-gelu",
    },
}  # fmt: skip


def _build(model, layout, groups, pp_rank=0):
    from megatron_metro.model.build import build_pieces

    place = replace(groups, pp_rank=pp_rank, pp_size=layout.pp_size)
    return build_pieces(replace(RUN, model=model), layout, place, torch.float32, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_of_every_piece_and_holders_of_shared_weights(variant, groups):
    model = replace(RUN.model, **VARIANTS[variant])
    chain = build_chain(model)
    for layout in (single_piece(chain), balance(chain, [1.0] * len(chain), [0.0] * len(chain), 2, 2)):
        holders = shared_weights(layout, model)
        for index, units in enumerate(layout.pieces):
            pp_rank, chunk = layout.place(index)
            weights = dict(_build(model, layout, groups, pp_rank)[chunk].named_parameters())
            assert sum(weight.numel() for weight in weights.values()) == count_parameters(units, model)
            assert {name for name in holders if name in weights} == {n for n, held in holders.items() if index in held}


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_of_every_weight(variant, groups):
    model = replace(RUN.model, **VARIANTS[variant])
    [piece] = _build(model, single_piece(build_chain(model)), groups)
    built = {name: list(weight.shape) for name, weight in piece.named_parameters()}
    for name in filter(has_vocabulary_rows, built):
        built[name][0] = model.vocab_size
    assert {name: list(shape) for name, shape in weight_shapes(model).items()} == built


@pytest.mark.parametrize(
    "variant",
    [
        "base",
        "narrow generator",
        "narrow generator, base++",
        "wide generator",
        "RTD on the decoder",
        "electra",
        "coco-lm",
    ],
)
def test_forward_flops_are_those_of_the_matrix_products(variant, groups):
    from megatron_metro.training.benchmark import draw_microbatch
    from megatron_metro.training.engine import Engine

    run = replace(RUN, model=replace(RUN.model, **VARIANTS[variant]))
    if not run.model.has_decoder:
        run = replace(run, objective=replace(run.objective, objective="electra"))
    chain, lengths = build_chain(run.model), static_lengths(run)
    engine = Engine(run, single_piece(chain), groups, torch.float32, 1)
    microbatch = draw_microbatch(run)
    with FlopCounterMode(display=False) as counter:
        engine.evaluate(iter([[microbatch]]))
    expected = sum(forward_flops(unit, run.model, lengths) for unit in chain)
    # The decoder's two attentions run fused, which torch counts or not from version to version.
    products = counter.get_flop_counts()["Global"]
    counted = sum(flops for operator, flops in products.items() if "attention" not in str(operator))
    p, s, t = run.model.num_attention_heads * run.model.head_size, lengths.encoder, lengths.decoder
    last_queries = t if run.model.has_decoder_rtd_head else lengths.targets  # the last layer's stand at slots
    num_queries = (run.model.decoder_num_layers - 1) * t + last_queries if run.model.has_decoder else 0
    expected -= num_queries * (4 * CAUSAL_SHARE * t * p + 4 * s * p)
    assert counted == expected * run.training.micro_batch_size
