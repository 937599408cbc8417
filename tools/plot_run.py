"""Draw the loss curves of one or more runs: python tools/plot_run.py RUN [RUN ...] --output curves.png

A folder whose folders are runs counts as one: their mean, with a band from the lowest to the highest. So three seeds of
one configuration are drawn as one curve.
"""

import sys
from pathlib import Path

from megatron_metro.analysis.curves import choose_names, format_table, name_groups, plot_runs, read_group
from megatron_metro.config.errors import exit_on_error
from megatron_metro.config.parser import Parser, whole_number


def _build_parser() -> Parser:
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run or of several, or a metrics.jsonl")
    flag("--output", type=Path, default=Path("curves.png"), metavar="PNG", help="file to write (default: curves.png)")
    flag("--names", nargs="+", help="numbers to draw, for example lm_loss; every loss when not given")
    flag("--window", type=whole_number(1), default=1, metavar="N", help="logged steps averaged in a training curve")
    flag("--x-axis", choices=("step", "FLOPs"), default="step", help="FLOPs: those of training, from config.yaml")
    flag("--table", action="store_true", help="print the last values on held-out text: mean and standard deviation")
    return parser


def main() -> None:
    """Read every run, choose what to draw, write one PNG."""
    with exit_on_error():
        flags = _build_parser().read(sys.argv[1:])
        groups = {
            name: read_group(path, flags.x_axis) for name, path in zip(name_groups(flags.runs), flags.runs, strict=True)
        }
        names = choose_names([run for group in groups.values() for run in group], flags.names)
        plot_runs(groups, names, flags.output, window=flags.window, x_axis=flags.x_axis)
        sys.stdout.write((format_table(groups, names) + "\n") * flags.table + f"wrote {flags.output}\n")


if __name__ == "__main__":
    main()
