"""Convert checkpoints between formats, or look at ours.

  python tools/convert_checkpoint.py --from X --to Y --input DIR --output DIR [--check-logits N] [flags of a run]
  python tools/convert_checkpoint.py verify DIR | inspect DIR [--step N] [--json]

The --save folder of a run may be in use. Flags of a run, such as --num-attention-heads and --tokenizer-model, say what
a format does not, or say it otherwise. verify compares every byte with the manifest, inspect lists every tensor.
Nothing that a file holds is ever run.
"""

import json
import sys
from pathlib import Path

from megatron_metro.checkpoint import inspection
from megatron_metro.config.cli import read_settings
from megatron_metro.config.errors import exit_on_error
from megatron_metro.config.parser import Parser, whole_number


def _convert(argv: list[str]) -> None:
    # Looking at checkpoints does without the packages that these need.
    from megatron_metro.conversion.convert import SOURCES, TARGETS, Conversion, convert  # noqa: PLC0415
    from megatron_metro.conversion.logits import LogitCheck  # noqa: PLC0415

    parser = Parser(description=__doc__)
    flag, folder = parser.add_argument, {"type": Path, "required": True, "metavar": "DIR"}
    flag("--from", dest="source", required=True, choices=SOURCES, help="format of the input")
    flag("--to", dest="target", required=True, choices=TARGETS, help="format of the output")
    flag("--input", **folder, help="what to read: a folder, or a file of fairseq's")
    flag("--output", **folder, help="folder to make")
    flag("--step", type=whole_number(0), metavar="N", help="iteration of --from megatron; the newest when not given")
    flag("--check-logits", type=whole_number(1), metavar="N", help="compare both sides on N random inputs")
    flags, rest = parser.read_own(argv)
    settings, num_inputs = read_settings(rest, parser.list_flags()), vars(flags).pop("check_logits")
    check = LogitCheck(num_inputs) if num_inputs else None
    num_weights = convert(Conversion(**vars(flags), settings=settings), check)
    print(f"{flags.output}: {num_weights} weights, read again and equal{check.report if check else ''}")


def _look(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("command", choices=("verify", "inspect"))
    parser.add_argument("folder", type=Path, metavar="DIR", help="a run's --save folder, or one step of it")
    parser.add_argument("--step", type=whole_number(0), metavar="N", help="iteration (verify: all; inspect: last)")
    parser.add_argument("--json", action="store_true", help="inspect: one JSON object instead of a table")
    flags = parser.read(argv)
    steps = inspection.list_steps(flags.folder, flags.step)
    if flags.command == "verify":
        inspection.verify_steps(steps)
    elif flags.json:
        print(json.dumps(inspection.describe_step(steps[-1])))
    else:
        print(*inspection.format_step(inspection.describe_step(steps[-1])), sep="\n")


if __name__ == "__main__":
    with exit_on_error():
        (_look if sys.argv[1:2] in (["verify"], ["inspect"]) else _convert)(sys.argv[1:])
