"""From a configuration to its stage table."""

from dataclasses import replace

import pytest

from megatron_metro.config.presets import PRESETS
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
