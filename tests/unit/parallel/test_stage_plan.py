"""From a configuration to its stage table."""

import random
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from megatron_metro.analysis.cost import unit_costs
from megatron_metro.config.chain import build_chain
from megatron_metro.config.lengths import static_lengths
from megatron_metro.config.presets import PRESETS
from megatron_metro.config.schema import ModelConfig
from megatron_metro.parallel.layout import balance
from megatron_metro.parallel.layout_text import LayoutError
from megatron_metro.parallel.stage_plan import format_stages, plan_layout, plan_stages


def _run(preset="metro-base", **parallel):
    run = PRESETS[preset]()
    return replace(run, parallel=replace(run.parallel, **parallel))


def test_plan_counts_copies_bytes_and_bubble():
    run = _run(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2)
    plan = plan_stages(run, num_microbatches=8)
    assert plan.layout == plan_layout(run)
    assert [(piece.rank, piece.chunk) for piece in plan.pieces] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert plan.num_parameters == 255_979_265
    holders = len(plan.layout.pieces_holding(("generator_embedding", "mlm_head", "decoder_embedding", "lm_head")))
    copies = sum(piece.parameters for piece in plan.pieces) - plan.num_parameters
    assert copies == (holders - 1) * 33_280 * 768
    assert plan.pieces[-1].bytes_sent == 0
    assert plan.pieces[0].bytes_sent == 16 * 768 * 4 * (512 + 1)
    assert plan.bubble == 1 / 17
    assert 1.0 <= plan.rank_imbalance <= plan.imbalance
    assert plan.time_imbalance >= 1.0


@pytest.mark.parametrize(
    ("preset", "pp_size", "vpp_size", "limit", "optimum"),
    # Optima with short last layers; with full ones they would be 1.055 and 1.036.
    [("metro-large++", 4, 2, 1.06, 1.0368), ("metro-xl", 8, 1, 1.04, 1.0184)],
)
def test_balance_of_the_presets(preset, pp_size, vpp_size, limit, optimum):
    run = _run(preset, pipeline_model_parallel_size=pp_size, num_virtual_stages_per_pipeline_rank=vpp_size)
    plan = plan_stages(run, num_microbatches=8)
    print(f"largest/mean {plan.imbalance:.4f}: {plan.layout.format()}")
    assert round(plan.imbalance, 4) == optimum <= limit


def test_a_cut_between_a_last_layer_and_its_head_costs_the_whole_layer():
    between, before = (
        plan_stages(_run(pipeline_model_parallel_size=2, pipeline_model_parallel_layout=text), 1)
        for text in ("g*4e*12d*12|L", "g*4e*12d*11|dL")
    )
    run = _run()
    costs = {str(cost.unit): cost for cost in unit_costs(run.model, static_lengths(run))}
    first, last = costs["decoder_layer 0"], costs["decoder_layer 11"]
    assert between.pieces[0].forward_flops - before.pieces[0].forward_flops == pytest.approx(first.forward_flops)
    assert before.pieces[1].forward_flops - between.pieces[1].forward_flops == pytest.approx(last.forward_flops)
    assert last.forward_flops < 0.5 * first.forward_flops


def test_balance_with_costs_of_cuts_equals_brute_force_on_500_random_chains():
    generator = random.Random(1)
    num_changed = 0
    for _ in range(500):
        model = ModelConfig(
            generator_num_layers=generator.randint(0, 3),
            encoder_num_layers=generator.randint(1, 3),
            decoder_num_layers=generator.randint(1, 3),
        )
        chain = build_chain(model)
        pp_size, vpp_size = generator.choice([(2, 1), (3, 1), (4, 1), (2, 2), (5, 1)])
        # Small whole numbers, so that ties are common and exact.
        costs = [float(generator.choice([0, 0, 1, 2, 3, 5])) for _ in chain]
        sent = [float(generator.randint(1, 4)) for _ in chain]
        extra = [float(generator.choice([0, 0, 1, 3])) for _ in chain]

        def judge(cuts, costs=costs, sent=sent, extra=extra):
            loads = [sum(costs[start:end]) for start, end in pairwise(cuts)]
            paid = [extra[cut - 1] for cut in cuts[1:-1]] + [0.0]
            return max(map(sum, zip(loads, paid))), sum(sent[cut - 1] for cut in cuts[1:-1])

        def cuts_of(layout):
            return [0, *(layout.chain.index(piece[-1]) + 1 for piece in layout.pieces)]

        cuts = combinations(range(1, len(chain)), pp_size * vpp_size - 1)
        best = min(judge([0, *found, len(chain)]) for found in cuts)
        assert judge(cuts_of(balance(chain, costs, sent, pp_size, vpp_size, extra))) == best
        num_changed += judge(cuts_of(balance(chain, costs, sent, pp_size, vpp_size))) != best
    assert num_changed > 50


def test_a_layout_by_hand_is_taken():
    run = _run(pipeline_model_parallel_size=2, pipeline_model_parallel_layout="g*4e*12|d*12")
    plan = plan_stages(run, num_microbatches=1)
    assert plan.layout.format() == "Gg*4Me*12R|Dd*12L"
    table = format_stages(plan)
    assert "| 0 | 0 | 0 | Gg*4Me*12R |" in table and '--pipeline-model-parallel-layout "Gg*4Me*12R|Dd*12L"' in table
    with pytest.raises(LayoutError, match="nearest legal layout"):
        plan_layout(_run(pipeline_model_parallel_size=2, pipeline_model_parallel_layout="g*4e*12|d*11"))


def test_bytes_follow_precision_and_sequence_parallelism():
    run = _run(pipeline_model_parallel_size=2, pipeline_model_parallel_layout="g*4|e*12d*12")
    wide = plan_stages(run, 1).pieces[0].bytes_sent
    narrow = replace(
        run,
        optimizer=replace(run.optimizer, bf16=True),
        parallel=replace(run.parallel, tensor_model_parallel_size=4, sequence_parallel=True),
    )
    assert wide == 16 * 768 * 4 * (512 + 1)
    assert plan_stages(narrow, 1).pieces[0].bytes_sent == 16 * 768 * 2 * (128 + 1)
