"""Measure speed: python tools/benchmark.py step [--peer hf]. Progress lines, then one JSON object as the last line."""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

import torch

from megatron_metro import device
from megatron_metro.parallel.groups import single_process
from megatron_metro.training import benchmark

PEERS = ("hf", "hf_masked")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="METRO's training step on one CPU thread against T5's and against peers")
    step.add_argument("--peer", choices=PEERS, nargs="+", default=[], help="METRO with Hugging Face transformers")
    step.add_argument("--rounds", type=int, default=9, help="timed rounds, in which every contestant takes a step")
    step.add_argument("--warmups", type=int, default=2, help="untimed rounds before them")
    for field in fields(benchmark.Workload):
        step.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    return parser.parse_args()


def _build_contestants(workload: benchmark.Workload, peers: list[str]) -> dict[str, benchmark.Step]:
    cpu = device.activate("cpu")
    groups = single_process(cpu)
    metro, t5 = benchmark.metro_run(workload), benchmark.t5_run(workload)
    cpu.seed_all(metro.training.seed)
    steps = {"metro": benchmark.build_step(metro, groups), "t5": benchmark.build_step(t5, groups)}
    if peers:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from tests.helpers.hf_metro import build_hf_step  # noqa: PLC0415 (transformers is optional)

        microbatch = benchmark.draw_microbatch(metro)
        steps |= {peer: build_hf_step(metro, microbatch, masked_heads=peer == "hf_masked") for peer in peers}
    return steps


def main() -> None:
    """One thread and one process, whatever the machine has."""
    arguments = _parse_arguments()
    workload = benchmark.Workload(**{f.name: getattr(arguments, f.name) for f in fields(benchmark.Workload)})
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(workload.matmul_precision)
    steps = _build_contestants(workload, arguments.peer)
    before = benchmark.measure_gemm()
    print(f"GEMM: {before / 1e9:.1f} GFLOP/s")
    timings = benchmark.time_side_by_side(steps, arguments.rounds, arguments.warmups, print)
    print(json.dumps(benchmark.summarise_steps(workload, timings, [before, benchmark.measure_gemm()])))


if __name__ == "__main__":
    main()
