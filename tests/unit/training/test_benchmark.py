"""The step benchmark: its workloads, its harness and its peer; no time is asserted."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_metro.analysis.cost import MessageFormat, unit_costs
from megatron_metro.config.chain import build_chain
from megatron_metro.config.lengths import static_lengths
from megatron_metro.parallel.layout import format_units
from megatron_metro.training import benchmark, benchmark_checkpoint, benchmark_data, benchmark_pipeline
from megatron_metro.training.benchmark import Timing, Workload
from tests.helpers.hf_metro import HfMetro, label_batch

TINY = Workload(hidden_size=64, num_layers=1, generator_num_layers=1, seq_length=64, vocab_size=512, micro_batch_size=2)


def test_t5_reads_the_same_text():
    default = Workload()
    metro, t5 = benchmark.metro_run(default), benchmark.t5_run(default)
    assert (t5.data.encoder_seq_length, t5.data.decoder_seq_length) == (231, 52)
    assert metro.model.num_attention_heads == 4 and metro.model.ffn_hidden_size == 1024
    assert t5.model == replace(metro.model, generator_num_layers=0)


def test_microbatches_are_of_the_runs_shape():
    metro, t5 = (benchmark.draw_microbatch(run(TINY)) for run in (benchmark.metro_run, benchmark.t5_run))
    assert metro.shape.num_masked_slots == 16 and metro.generator_tokens.shape == (2, 64)
    assert t5.shape.num_masked_slots == 0 and t5.shape.num_target_slots == t5.shape.decoder_length
    assert int(metro.encoder_tokens.max()) < 512


def test_contestants_take_turns_and_warm_ups_do_not_count():
    calls, lines = [], []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = benchmark.time_side_by_side(steps, num_rounds=2, num_warmups=1, report=lines.append)
    assert "".join(calls) == "ababab"
    assert {name: len(taken) for name, taken in timings.items()} == {"a": 2, "b": 2}
    assert len(lines) == 3 and lines[0].startswith("warm-up 1: a ")


def test_the_result_is_one_json_object_with_the_promised_names():
    times = {"metro": (2.0, 2.0, 4.0), "t5": (1.0, 1.0, 2.0), "hf": (3.0, 4.0, 6.0)}
    timings = {name: [Timing(processor=s, clock=1.5 * s) for s in seconds] for name, seconds in times.items()}
    result = json.loads(json.dumps(benchmark.summarise_steps(Workload(), timings, [90e9, 100e9])))
    assert result["seq_per_second"] == 4.0
    assert result["gemm_gflops"] == 100.0
    assert result["cpu_gemm_percent"] == round(4 * result["metro_gflops_per_sequence"], 2)
    assert (result["metro_over_t5"], result["speedup_over_hf"], result["speedup_over_hf_masked"]) == (2.0, 1.5, None)
    assert result["flops_ratio"] > result["minimal_flops_ratio"] > 1.8
    assert result["metro_over_t5_over_flops_ratio"] == round(2 / result["flops_ratio"], 3)
    assert result["clock_over_processor"] == 1.5
    assert result["step_seconds"]["metro"] == {"median": 2, "quartile_1": 2, "quartile_3": 3, "min": 2, "max": 4}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_peers_loss_does_not_depend_on_where_heads_run(seed):
    run = benchmark.metro_run(TINY)
    batch = label_batch(benchmark.draw_microbatch(run))
    losses = []
    for masked_heads in (False, True):
        torch.manual_seed(seed)
        metro = HfMetro(run.model, masked_heads=masked_heads)
        loss = metro(batch)
        loss.backward()
        assert all(
            parameter.grad is not None for name, parameter in metro.named_parameters() if "positions" not in name
        )
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_another_precision_lasts_for_its_step_only():
    seen = []
    step = benchmark.in_precision("medium", lambda: seen.append(torch.get_float32_matmul_precision()))
    step()
    assert (seen, torch.get_float32_matmul_precision()) == (["medium"], "highest")
    assert 0 < benchmark.measure_gemm_error("highest") < 1e-5


def test_every_unit_is_timed_and_held_against_the_plan(groups):
    run = benchmark.metro_run(replace(TINY, num_layers=2, generator_num_layers=2))
    microbatch = benchmark.draw_microbatch(run)
    pieces = benchmark_pipeline.build_timed_pieces(run, groups, microbatch)
    assert [format_units(piece.units) for piece in pieces] == [
        "G",
        "g",
        "g",
        "M",
        "e",
        "e",
        "R",
        "D",
        "d",
        "d",
        "L",
        "gM",
        "dL",
    ]
    seconds = benchmark_pipeline.run_pieces(pieces, microbatch)
    assert min(seconds) > 0.0
    found = benchmark_pipeline.compare_with_plan(run, [piece.units for piece in pieces], np.asarray([seconds] * 3))
    assert list(found["by_unit"]) == ["G", "g", "M", "e", "R", "D", "d", "L", "gM", "dL"]
    assert {"g", "e", "d", "gM"} <= set(found["main_units"])


def test_times_in_the_plans_ratios_deviate_by_nothing():
    run = benchmark.metro_run(TINY)
    chain = build_chain(run.model)
    message = MessageFormat(micro_batch_size=run.training.micro_batch_size)
    costs = unit_costs(run.model, static_lengths(run), message)
    seconds = np.asarray([[(cost.work + cost.extra_work_if_cut) / 1e10 for cost in costs]])
    found = benchmark_pipeline.compare_with_plan(run, [(unit,) for unit in chain], seconds)
    assert found["largest_deviation_percent"] == 0.0
    assert found["fitted_flops_per_byte"] == found["planned_flops_per_byte"]
    seconds[0, 1] *= 1.5
    assert (
        benchmark_pipeline.compare_with_plan(run, [(unit,) for unit in chain], seconds)["by_unit"]["g"][
            "deviation_percent"
        ]
        > 10
    )


def test_payloads_of_planned_layouts_are_timed(groups):
    lines = []
    workload = replace(TINY, num_layers=3, generator_num_layers=2)
    found = benchmark_pipeline.measure_payload(workload, groups, num_rounds=1, num_warmups=0, report=lines.append)
    assert set(found["percent_of_step"]) == {"pp2x1", "pp4x1", "pp4x2"}
    assert json.loads(json.dumps(found)) and len(lines) == 4


def test_data_rates_come_with_a_peer(tmp_path, monkeypatch):
    from tests.helpers.benchmark_peers import build_core_reader

    for name, value in {"TEXT_CHARACTERS": 400_000, "TRAINED_CHARACTERS": 100_000, "NUM_PIECES": 600}.items():
        monkeypatch.setattr(benchmark_data, name, value)
    monkeypatch.setattr(benchmark_data, "BLOCKS_PER_CALL", 16)
    monkeypatch.setattr(benchmark_data, "WAITING", TINY)
    result = benchmark_data.measure_data(tmp_path, {"core_t5": build_core_reader}, 1, 0, lambda line: None)
    assert json.loads(json.dumps(result))["t5_span_loader_speedup"]["core_t5"] > 0
    rates = [
        result[f"{name}_{figure}blocks_per_second"]
        for name in ("metro", "t5_span", "spactor")
        for figure in ("", "small_call_", "loader_")
    ]
    assert min(rates) > 0 and result["loader_wait_percent"] > 0 and result["preprocess_tokens_per_cpu_second"] > 0


def test_the_checkpoint_benchmark_times_a_save_with_and_without_hashes(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_checkpoint, "TENSOR_SHAPE", (16, 16))
    result = benchmark_checkpoint.measure_checkpoint(tmp_path, 1, 0, lambda line: None)
    assert json.loads(json.dumps(result))["file_bytes"] > 32 * 1024
    assert result["verify_gb_per_core_second"] > 0 and result["hashing_share_of_save"] < 1
    assert min(result["save_seconds"].values()) > 0 and result["background_blocks_seconds"] > 0
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written["plain"] == written["hashed"] == written["shard"]
