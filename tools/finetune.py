"""Fine-tune a saved run on sources and targets, in one process or, with torchrun, in many.

    python tools/finetune.py --pretrained-checkpoint runs/base --data-path train.jsonl --save runs/task --load runs/task

Each line of the JSON lines (plain, .gz or .zst) is {"source": "...", "target": "..."}. Architecture and tokenizer are
those of the checkpoint, whose generator and RTD head are left behind; any layout may differ from the one that saved it.
The same command goes on where it was stopped. Worth choosing: --encoder-seq-length and --decoder-seq-length, as long as
your longest source and target; --pack-examples, which fills rows with several examples that do not see each other;
--lr, --train-iters, --micro-batch-size. --train-data-path and --valid-data-path name files of their own, otherwise
--split holds some examples out. What was learnt is written by tools/generate.py --load runs/task.

The defaults below are those of fine-tuning.
"""

import logging
import sys

from megatron_metro.checkpoint.start import read_saved_settings
from megatron_metro.config.cli import DESCRIPTION, Tool, parse_run
from megatron_metro.config.errors import exit_on_error
from megatron_metro.config.presets import fine_tuning
from megatron_metro.config.validation import require_fine_tuning
from megatron_metro.parallel.groups import find_place
from megatron_metro.training.loop import pretrain

TOOL = Tool(description=f"{__doc__}\n{DESCRIPTION}", start=fine_tuning())


def main() -> None:
    """Check the flags on every rank before anything starts, then train."""
    with exit_on_error():
        rank, world_size = find_place()
        if rank:  # what is said of flags is the same on every rank
            logging.getLogger("megatron_metro").setLevel(logging.ERROR)
        run = parse_run(sys.argv[1:], world_size, read_saved=read_saved_settings, tool=TOOL)
        require_fine_tuning(run)
        pretrain(run, rank, world_size)


# The checkpoint writer may spawn processes, which import this file again.
if __name__ == "__main__":
    main()
