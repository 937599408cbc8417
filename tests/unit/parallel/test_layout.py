"""Stage layouts: cutting, balancing against brute force, the string form, and who holds shared weights."""

import random
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from megatron_metro.config.chain import build_chain
from megatron_metro.config.schema import ModelConfig
from megatron_metro.parallel.layout import (
    StageLayout,
    balance,
    parse,
    shared_weights,
    single_piece,
)
from megatron_metro.parallel.layout_text import LayoutError, expand

METRO = ModelConfig(generator_num_layers=2, encoder_num_layers=4, decoder_num_layers=3, vocab_size=1024)
CHAIN = build_chain(METRO)
T5_CHAIN = build_chain(replace(METRO, generator_num_layers=0))


def _every_cut(num_units: int, num_pieces: int):
    for cuts in combinations(range(1, num_units), num_pieces - 1):
        yield [0, *cuts, num_units]


def _largest(costs, cuts):
    return max(sum(costs[start:end]) for start, end in pairwise(cuts))


def _cuts_of(layout: StageLayout) -> list[int]:
    cuts = [0]
    for piece in layout.pieces:
        cuts.append(cuts[-1] + len(piece))
    return cuts


def test_piece_order_is_that_of_the_interleaved_schedule():
    layout = balance(CHAIN, [1.0] * len(CHAIN), [0.0] * len(CHAIN), 3, 2)
    assert layout.chain == CHAIN
    assert layout.piece(1, 1) is layout.pieces[4]
    assert [layout.place(layout.piece_index(r, c)) for c in range(2) for r in range(3)] == [
        (r, c) for c in range(2) for r in range(3)
    ]
    assert layout.is_last(5) and not layout.is_last(4)


def test_balance_equals_brute_force_on_500_random_chains():
    generator = random.Random(0)
    for _ in range(500):
        model = ModelConfig(
            generator_num_layers=generator.randint(0, 3),
            encoder_num_layers=generator.randint(1, 3),
            decoder_num_layers=generator.randint(1, 3),
            rtd_head=generator.choice(["roberta", "none"]),
        )
        chain = build_chain(model)
        assert len(chain) <= 14
        pp_size, vpp_size = generator.choice([(2, 1), (3, 1), (4, 1), (2, 2), (5, 1)])
        num_pieces = pp_size * vpp_size
        # Small whole numbers, so that ties are common and exact.
        costs = [float(generator.choice([0, 0, 1, 2, 3, 5])) for _ in chain]
        sent = [float(generator.randint(1, 4)) for _ in chain]
        best = min(
            (_largest(costs, cuts), sum(sent[cut - 1] for cut in cuts[1:-1]))
            for cuts in _every_cut(len(chain), num_pieces)
        )
        cuts = _cuts_of(balance(chain, costs, sent, pp_size, vpp_size))
        assert (_largest(costs, cuts), sum(sent[cut - 1] for cut in cuts[1:-1])) == best


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("Gg*2M|e*4R|Dd*3L", "GggM|eeeeR|DdddL"),
        ("g*2|(e|)*3e,d | d*2", "gg|e|e|e|ed|dd"),
        ("((e|)*2d|)*2", "e|e|d|e|e|d|"),
        ("e|*2", "e||"),
    ],
)
def test_expand_writes_out_repetitions(text, expanded):
    assert expand(text) == expanded


@pytest.mark.parametrize("text", ["e)", "(e", "e*", "e*0", "*3", "e*2*2", "(e*9999)*9999", "()*3"])
def test_broken_strings_are_refused_in_one_line(text):
    with pytest.raises(LayoutError, match="--pipeline-model-parallel-layout") as error:
        expand(text)
    assert "\n" not in str(error.value)


def test_what_is_not_written_follows_its_neighbour():
    layout = parse("gg|e*2|e*2|d*3", CHAIN, 4)
    assert layout.format() == "Gg*2M|e*2|e*2R|Dd*3L"
    assert parse("g|gMe|eee|RDddd|L", CHAIN, 5).format() == "Gg|gMe|e*3|RDd*3|L"
    assert parse("G|gg|eeee|dd|d", CHAIN, 5).format() == "G|g*2M|e*4R|Dd*2|dL"
    assert parse("eeee|ddd", T5_CHAIN, 2).format() == "Ee*4|Dd*3L"


def test_every_cut_survives_format_and_parse():
    for cuts in _every_cut(len(CHAIN), 4):
        pieces = tuple(CHAIN[start:end] for start, end in pairwise(cuts))
        layout = StageLayout(pieces=pieces, pp_size=2, vpp_size=2)
        assert parse(layout.format(), CHAIN, 2, 2) == layout


@pytest.mark.parametrize(
    ("text", "problem", "nearest"),
    [
        ("gg|eeee|ddd", "3 pieces where pipeline size x virtual stages asks for 2", "Gg*2Me*2|e*2RDd*3L"),
        ("gge|eeee|", "3 pieces", None),
        ("ggeeee|ddd*2", '"d" (decoder_layer) is written 4 times and the model has 3', None),
        ("ggeeeeddd|", "piece 1 is empty", "Gg*2Me*4RDd*3|L"),
        ("ttt|ttt", 'letter "t" names no unit of this model, whose letters are GgMeRDdL', "Gg*2Me*3|eRDd*3L"),
        ("ddd|eeeegg", "units are not in the order GgMeRDdL", None),
        ("GGgg|eeeeddd", '"G" (generator_embedding) is written 2 times', None),
    ],
)
def test_bad_layouts_name_the_nearest_legal_one(text, problem, nearest):
    with pytest.raises(LayoutError) as error:
        parse(text, CHAIN, 2)
    message = str(error.value)
    assert problem in message and "\n" not in message
    named = message.rsplit('"', 2)[1]
    assert parse(named, CHAIN, 2).format() == named
    assert nearest is None or named == nearest


def test_sizes_no_layout_can_have_are_refused():
    with pytest.raises(LayoutError, match="20 pieces of a model with 14 units; the nearest legal sizes are 10 x 1"):
        parse("e", CHAIN, 10, 2)
    with pytest.raises(LayoutError, match="nearest legal sizes are 14 x 1"):
        balance(CHAIN, [1.0] * 14, [1.0] * 14, 99)
    with pytest.raises(LayoutError, match="needs --pipeline-model-parallel-size 2 or more"):
        balance(CHAIN, [1.0] * 14, [1.0] * 14, 1, 2)


def test_shared_weights_of_metro():
    layout = parse("gg|e*2|e*2|d*3", CHAIN, 4)
    assert shared_weights(layout, METRO) == {"word_embeddings.weight": (0, 3)}
    untied = replace(METRO, untie_embeddings_and_output_weights=True)
    assert shared_weights(parse("g|ge|eee|Ddd|dL", CHAIN, 5), untied) == {"word_embeddings.weight": (0, 1, 3)}
    plus = replace(METRO, generator_embedding_sharing="token_pos_norm")
    holders = shared_weights(parse("Gg|gMeeee|dd|dL", CHAIN, 2, 2), plus)
    assert holders == {
        "word_embeddings.weight": (0, 1, 2, 3),
        "encoder.position_embeddings.weight": (0, 1),
        "encoder.embedding_norm.weight": (0, 1),
        "encoder.embedding_norm.bias": (0, 1),
    }
    assert shared_weights(single_piece(CHAIN), METRO) == {"word_embeddings.weight": (0,)}


def test_an_encoder_alone_ends_with_its_head():
    model = replace(METRO, decoder_num_layers=0)
    layout = parse("Gg*2|ee|ee", build_chain(model), 3)
    assert layout.format() == "Gg*2|Me*2|e*2R" or layout.format() == "Gg*2M|e*2|e*2R"
    assert shared_weights(layout, model)["word_embeddings.weight"] == (0,)
    written = parse("Gg*2|Mee|eeRL", build_chain(replace(model, encoder_lm_head=True)), 3)
    assert shared_weights(written, replace(model, encoder_lm_head=True))["word_embeddings.weight"] == (0, 1, 2)


def test_shared_weights_of_t5():
    model = ModelConfig(
        generator_num_layers=0, encoder_num_layers=4, decoder_num_layers=3, position_embedding_type="none",
        norm_placement="pre", normalization="RMSNorm", relative_attention="per_stack", relative_attention_decoder=True,
        relative_attention_bucket="t5",
    )  # fmt: skip
    layout = parse("ee|ee|d|dd", build_chain(model), 4)
    assert shared_weights(layout, model) == {
        "word_embeddings.weight": (0, 2, 3),
        "encoder.relative_bias.weight": (0, 1),
        "decoder.relative_bias.weight": (2, 3),
    }
