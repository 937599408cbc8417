"""Plan a run without processes or a GPU: python tools/plan.py --layout-table --preset metro-base [flags of pretrain.py]

--layout-table prints which units of the model each pipeline stage holds, what it computes and sends, and the bubble;
--flops how many steps a budget allows.
"""

import sys

from megatron_metro.analysis.budget import steps_within
from megatron_metro.checkpoint.start import read_saved_settings
from megatron_metro.config.cli import parse_run
from megatron_metro.config.errors import ConfigError, exit_on_error
from megatron_metro.config.parser import Parser, number, whole_number
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.validation import replica_size
from megatron_metro.parallel.stage_plan import format_stages, plan_stages


def _build_parser() -> Parser:
    """This tool's flags; all others describe the run."""
    parser = Parser(description=__doc__)
    parser.add_argument("--layout-table", action="store_true", help="print the table of pipeline stages")
    parser.add_argument(
        "--flops", type=number(1, 1e30), metavar="F", help="print the most steps that train with no more FLOPs"
    )
    parser.add_argument(
        "--world-size", type=whole_number(1), metavar="N", help="processes of the run; one model replica when not given"
    )
    return parser


def main() -> None:
    """Read the run, print what is asked for."""
    parser = _build_parser()
    with exit_on_error():
        own, argv = parser.read_own(sys.argv[1:])
        run = parse_run(argv, own.world_size, parser.list_flags(), read_saved_settings)
        if own.flops is not None:
            sys.stdout.write(f"{steps_within(run, own.flops)}\n")
        elif not own.layout_table:
            raise ConfigError("--layout-table: nothing is asked for; give it, or --flops")
        if own.layout_table:
            sys.stdout.write(_describe_layout(run, own.world_size))


def _describe_layout(run: RunConfig, world_size: int | None) -> str:
    training = run.training
    assert training.global_batch_size is not None, "parse_run resolves it"
    num_replicas = (world_size or replica_size(run.parallel)) // replica_size(run.parallel)
    plan = plan_stages(run, training.global_batch_size // (training.micro_batch_size * num_replicas))
    return format_stages(plan) + "\n"


if __name__ == "__main__":
    main()
