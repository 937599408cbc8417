"""`tools/pretrain.py` with one fault on one rank, which the environment describes: `FAULT=point:rank:step:action`.

The step is the number of completed ones. Just before a fault its time is written to the file that FAULT_TIME names.
"""

import ctypes
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules

from megatron_metro.config.errors import DataError
from megatron_metro.data.loader import StepLoader
from megatron_metro.training import engine
from megatron_metro.training.engine import Engine
from megatron_metro.training.loop import Trainer
from megatron_metro.training.reporting import Reporter
from megatron_metro.training.saving import Saver


def raise_error(error: BaseException) -> None:
    raise error


def hold_the_lock() -> None:
    """Sleep in C without giving up Python's lock."""
    ctypes.PyDLL(None).sleep(3600)


ACTIONS: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "segv": lambda: ctypes.string_at(0),
    "sleep": lambda: time.sleep(3600),
    "lock": hold_the_lock,
    "exit0": lambda: os._exit(0),
    "exit3": lambda: os._exit(3),
    "sysexit0": lambda: sys.exit(0),
    "bug": lambda: raise_error(KeyError("a bug")),
    "data-error": lambda: raise_error(DataError("text.bin is damaged")),
    "disk-full": lambda: raise_error(OSError(errno.ENOSPC, "No space left on device")),
    "no-memory": lambda: raise_error(torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "int": lambda: os.kill(os.getpid(), signal.SIGINT),
    "usr1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "slow": lambda: time.sleep(0.5),
}
# A fault comes just before its point.
POINTS: dict[str, tuple[Any, str]] = {
    "data": (StepLoader, "next_step"),
    "forward": (engine, "_forward_step"),
    "backward": (schedules, "backward_step"),
    "grad-sync": (Engine, "_finalize_gradients"),
    "optimizer": (engine, "optimizer_step"),
    "report": (Trainer, "_report"),
    "evaluate": (Engine, "evaluate"),
    "save": (Saver, "save"),
    "log": (Reporter, "step"),
}


def install(text: str) -> None:
    """Put the fault in."""
    point, rank, step, action = text.split(":")
    if int(rank) != int(os.environ.get("RANK", "0")):
        return
    current = {"step": -1}
    take_step = Trainer._step

    def take_and_note(trainer: Trainer, *arguments: Any) -> Any:
        current["step"] = trainer.state.iteration
        return take_step(trainer, *arguments)

    Trainer._step = take_and_note  # type: ignore[method-assign]
    owner, name = POINTS[point]
    original = getattr(owner, name)

    def run(*arguments: Any, **options: Any) -> Any:
        is_due = current["step"] >= int(step) if action == "slow" else current["step"] == int(step)
        if is_due:
            if action != "slow":
                current["step"] = -1  # once
            if "FAULT_TIME" in os.environ:
                Path(os.environ["FAULT_TIME"]).write_text(str(time.time()))
            ACTIONS[action]()
        return original(*arguments, **options)

    setattr(owner, name, run)


if __name__ == "__main__":
    install(os.environ["FAULT"])
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
    import pretrain

    pretrain.main()
