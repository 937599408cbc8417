"""Plan a run without processes or a GPU: python tools/plan.py --layout-table --preset metro-base [flags of pretrain.py]

--layout-table prints which units of the model each pipeline stage holds, what it computes and sends, and the bubble.
"""

import sys

from megatron_metro.config.cli import parse_run
from megatron_metro.config.errors import ConfigError, exit_on_error
from megatron_metro.config.parser import Parser, whole_number
from megatron_metro.config.validation import replica_size
from megatron_metro.parallel.stage_plan import format_stages, plan_stages


def _build_parser() -> Parser:
    """This tool's flags; all others describe the run."""
    parser = Parser(description=__doc__)
    parser.add_argument("--layout-table", action="store_true", help="print the table of pipeline stages")
    parser.add_argument(
        "--world-size", type=whole_number(1), metavar="N", help="processes of the run; one model replica when not given"
    )
    return parser


def main() -> None:
    """Read the run, lay it out, print the table."""
    parser = _build_parser()
    with exit_on_error():
        own, argv = parser.read_own(sys.argv[1:])
        run = parse_run(argv, own.world_size, parser.list_flags())
        if not own.layout_table:
            raise ConfigError("--layout-table: nothing is asked for; give it")
        training = run.training
        assert training.global_batch_size is not None, "parse_run resolves it"
        num_replicas = (own.world_size or replica_size(run.parallel)) // replica_size(run.parallel)
        plan = plan_stages(run, training.global_batch_size // (training.micro_batch_size * num_replicas))
        sys.stdout.write(format_stages(plan) + "\n")


if __name__ == "__main__":
    main()
