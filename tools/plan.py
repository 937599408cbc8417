"""Plan a run without processes or a GPU: python tools/plan.py --layout-table --preset metro-base [flags of pretrain.py]

--layout-table prints which units of the model each pipeline stage holds, what it computes and sends, and the bubble.
"""

import argparse
import sys

from megatron_metro.config.cli import parse_run, read_run
from megatron_metro.config.errors import exit_on_error
from megatron_metro.config.validation import data_parallel_size
from megatron_metro.parallel.stage_plan import format_stages, plan_stages


def _parse_own_flags() -> tuple[argparse.Namespace, list[str]]:
    """This tool's flags and, apart, those that describe the run."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout-table", action="store_true", required=True, help="print the table of pipeline stages")
    parser.add_argument("--world-size", type=int, help="processes of the run; one model replica when not given")
    return parser.parse_known_args()


def main() -> None:
    """Read the run, lay it out, print the table."""
    own, argv = _parse_own_flags()
    with exit_on_error():
        parallel = read_run(argv).parallel
        replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        world_size = replica if own.world_size is None else own.world_size
        run = parse_run(argv, world_size)
        training = run.training
        assert training.global_batch_size is not None, "parse_run resolves it"
        num_replicas = data_parallel_size(run.parallel, world_size)
        plan = plan_stages(run, training.global_batch_size // (training.micro_batch_size * num_replicas))
        sys.stdout.write(format_stages(plan) + "\n")


if __name__ == "__main__":
    main()
