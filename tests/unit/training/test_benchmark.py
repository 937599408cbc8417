"""The step benchmark: its workloads, its harness and its peer; no time is asserted."""

import json
from dataclasses import replace

import pytest
import torch

from megatron_metro.training import benchmark
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
