"""Pretrain METRO-T5 or T5: `torchrun --nproc-per-node N tools/pretrain.py --preset metro-base --data-path ...`."""

import os
import sys

from megatron_metro.config.cli import parse_run
from megatron_metro.config.errors import exit_on_error
from megatron_metro.training.loop import pretrain


def main() -> None:
    """Check the flags on every rank before anything starts, then train."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with exit_on_error():
        pretrain(parse_run(sys.argv[1:], world_size), rank, world_size)


# The checkpoint writer may spawn processes, which import this file again.
if __name__ == "__main__":
    main()
