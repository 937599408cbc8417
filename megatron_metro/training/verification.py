"""Checks the files of a step on all ranks together; collective."""

from pathlib import Path

import torch.distributed as dist

from megatron_metro.checkpoint.manifest import list_files, verify_contents
from megatron_metro.parallel.agreement import on_every_rank, on_first_rank


def verify_on_all(folder: Path) -> None:
    """Read every byte of a step, each rank its share of the files. Raises CheckpointError, naming the file."""
    records = on_first_rank(lambda: list_files(folder))
    by_size = sorted(records, key=lambda name: (records[name].size, name))
    on_every_rank(lambda: verify_contents(folder, by_size[dist.get_rank() :: dist.get_world_size()], records))
