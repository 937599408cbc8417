"""Draw the loss curves of one or more runs: python tools/plot_run.py RUN [RUN ...] --output curves.png"""

import sys
from pathlib import Path

from megatron_metro.analysis.curves import choose_names, plot_runs, read_curves
from megatron_metro.config.errors import exit_on_error
from megatron_metro.config.parser import Parser, whole_number


def _build_parser() -> Parser:
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its metrics.jsonl")
    flag("--output", type=Path, default=Path("curves.png"), metavar="PNG", help="file to write (default: curves.png)")
    flag("--names", nargs="+", help="numbers to draw, for example lm_loss; every loss when not given")
    flag("--window", type=whole_number(1), default=1, metavar="N", help="logged steps averaged in a training curve")
    return parser


def main() -> None:
    """Read every run, choose what to draw, write one PNG."""
    with exit_on_error():
        flags = _build_parser().read(sys.argv[1:])
        runs = {str(path): read_curves(path) for path in flags.runs}
        names = choose_names(list(runs.values()), flags.names)
        plot_runs(runs, names, flags.output, window=flags.window)
        sys.stdout.write(f"wrote {flags.output}\n")


if __name__ == "__main__":
    main()
