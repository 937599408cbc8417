"""Look at checkpoints: python tools/convert_checkpoint.py verify DIR | inspect DIR [--step N] [--json]

verify compares every byte of a step, or of all steps of a run, with its manifest and reads what describes the tensors.
inspect lists every tensor with its norm, extremes and numbers that are not finite, and says where the step is from.
DIR is a run's --save folder, which may be in use, or one step of it. Nothing that a file holds is ever run.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from megatron_metro.checkpoint import inspection
from megatron_metro.checkpoint.manifest import list_files, verify_contents
from megatron_metro.checkpoint.reader import open_step
from megatron_metro.config.errors import exit_on_error
from megatron_metro.config.parser import Parser, whole_number


def _build_parser() -> Parser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("verify", "check every byte"), ("inspect", "show tensors and origin")):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("folder", type=Path, metavar="DIR", help="a run's --save folder, or one step of it")
        command.add_argument("--step", type=whole_number(0), metavar="N", help="iteration (verify: all; inspect: last)")
    commands.choices["inspect"].add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser


def _verify(flags: argparse.Namespace) -> None:
    steps = {step: list_files(step) for step in inspection.list_steps(flags.folder, flags.step)}
    total = sum(record.size for records in steps.values() for record in records.values())
    with tqdm(total=total, disable=None, unit="B", unit_scale=True) as progress:
        for step, records in steps.items():
            for name, record in records.items():
                verify_contents(step, [name], records)
                progress.update(record.size)
            progress.write(f"{step}: whole, {len(open_step(step, verify=False).names())} tensors")


def _inspect(flags: argparse.Namespace) -> None:
    reader = open_step(inspection.list_steps(flags.folder, flags.step)[-1])
    reports = list(tqdm(inspection.report_tensors(reader), disable=None, total=len(reader.names()), unit="tensor"))
    document = {"step": str(reader.folder), **inspection.describe_origin(reader.document)}
    document["total"] = inspection.total(reports)
    if flags.json:
        print(json.dumps({**document, "tensors": [asdict(report) for report in reports]}))
        return
    print(*inspection.format_origin(document), *inspection.format_table(reports), sep="\n")


if __name__ == "__main__":
    with exit_on_error():
        arguments = _build_parser().read(sys.argv[1:])
        _verify(arguments) if arguments.command == "verify" else _inspect(arguments)
