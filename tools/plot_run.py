"""Draw the loss curves of one or more runs: python tools/plot_run.py RUN [RUN ...] --output curves.png"""

import argparse
from pathlib import Path

from megatron_metro.analysis.curves import choose_names, plot_runs, read_curves
from megatron_metro.config.errors import exit_on_error


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its metrics.jsonl")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="PNG to write")
    parser.add_argument("--names", nargs="+", help="numbers to draw, for example lm_loss; every loss when not given")
    parser.add_argument("--window", type=int, default=1, help="logged steps averaged in a training curve")
    return parser.parse_args()


def main() -> None:
    """Read every run, choose what to draw, write one PNG."""
    arguments = _parse_arguments()
    with exit_on_error():
        runs = {str(path): read_curves(path) for path in arguments.runs}
        names = choose_names(list(runs.values()), arguments.names)
        plot_runs(runs, names, arguments.output, window=max(1, arguments.window))
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
