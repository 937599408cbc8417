"""Pretrain METRO-T5 or T5: `torchrun --nproc-per-node N tools/pretrain.py --preset metro-base --data-path ...`."""

import logging
import sys

from megatron_metro.checkpoint.start import read_saved_settings
from megatron_metro.config.cli import parse_run
from megatron_metro.config.errors import exit_on_error
from megatron_metro.parallel.groups import find_place
from megatron_metro.training.loop import pretrain


def main() -> None:
    """Check the flags on every rank before anything starts, then train."""
    with exit_on_error():
        rank, world_size = find_place()
        if rank:  # what is said of flags is the same on every rank
            logging.getLogger("megatron_metro").setLevel(logging.ERROR)
        pretrain(parse_run(sys.argv[1:], world_size, read_saved=read_saved_settings), rank, world_size)


# The checkpoint writer may spawn processes, which import this file again.
if __name__ == "__main__":
    main()
