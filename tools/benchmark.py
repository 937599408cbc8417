"""Measure speed on one CPU thread: benchmark.py {step,pipeline,data,checkpoint,decode}; last line one JSON object.

step: METRO's training step against T5's and peers. pipeline: messages, unit times against the plan's, the CPU adapter.
data: preprocessing, batches and loading against core's T5 dataset. checkpoint: hashes. decode: writing and scoring.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_metro.config.errors import exit_on_error
from megatron_metro.config.parser import Parser, number, whole_number
from megatron_metro.training import benchmark, benchmark_checkpoint, benchmark_data, benchmark_pipeline

COUNT, SHARE = {"type": whole_number(1), "metavar": "N"}, {"type": number(0, 1), "metavar": "X"}
KINDS: dict[type, dict[str, Any]] = {int: COUNT, float: SHARE, str: {"choices": ("highest", "high", "medium")}}
WORKLOAD = fields(benchmark.Workload)


def _parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("step", "pipeline", "data", "checkpoint", "decode"):
        command = commands.add_parser(name)
        command.add_argument("--rounds", **COUNT, default=9, help="timed rounds, a turn of every contestant each")
        command.add_argument("--warmups", **COUNT, default=2, help="untimed rounds before them")
    step = commands.choices["step"]
    step.add_argument("--peer", choices=("hf", "hf_masked"), nargs="+", default=[], help="METRO with transformers")
    for field in WORKLOAD:
        step.add_argument(f"--{field.name.replace('_', '-')}", **KINDS[type(field.default)], default=field.default)
    return parser.read(sys.argv[1:])


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # peers live beside the tests
    from tests.helpers import benchmark_peers as peers  # noqa: PLC0415 (not part of an installed package)

    how = (arguments.rounds, arguments.warmups, print)
    if arguments.command == "step":
        workload = benchmark.Workload(**{field.name: getattr(arguments, field.name) for field in WORKLOAD})
        steps = benchmark.build_steps(workload) | peers.build_hf_peers(workload, arguments.peer)
        return benchmark.compare_steps(workload, steps, *how)
    if arguments.command == "pipeline":
        return benchmark_pipeline.measure_pipeline(*how) | peers.measure_adapter()
    if arguments.command == "decode":
        return peers.measure_writing(*how)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.command == "checkpoint":
            return benchmark_checkpoint.measure_checkpoint(Path(folder), *how)
        return benchmark_data.measure_data(Path(folder), {"core_t5": peers.build_core_reader}, *how)


if __name__ == "__main__":
    with exit_on_error():
        print(json.dumps(_run(_parse_arguments())))
