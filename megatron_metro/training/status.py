"""What each rank is doing and how it ended, for machines: `<save>/status/rank_00000.json`, replaced as a whole.

torchrun turns every exit code of a process into 1; the cause stands here. "running" and "stopping" are causes as well:
those of a process that was killed before it could write another.
"""

import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_metro.config.files import write_atomically

STATUS_FOLDER = "status"
LAST_PHASE = "end"  # everything is done and saved
CAUSES = {
    0: "done",
    64: "config",
    65: "data",
    66: "checkpoint",
    70: "bug",
    71: "memory",
    74: "storage",
    75: "preempted",
    76: "numeric",
    77: "unsafe",
    78: "peer",
}


@dataclass(slots=True)
class Progress:
    """How far this rank has come. All ranks go through the same phases, so their counts can be compared."""

    num_phases: int = 0
    phase: str = "start"
    step: int = 0  # completed
    last_good: int | None = None  # newest step that a resumed run can start from
    moved_at: float = field(default_factory=time.monotonic)
    is_leaving: bool = False  # the main thread is on its way out, whatever the reason

    def enter(self, phase: str) -> None:
        """Begin something that other ranks may have to wait for."""
        self.num_phases += 1
        self.phase = phase
        self.tick()

    def tick(self) -> None:
        """Show that this rank still gets on within its phase."""
        self.moved_at = time.monotonic()


class StatusFile:
    """This rank's file; does nothing without --save."""

    def __init__(self, save: str | None, rank: int, progress: Progress) -> None:
        self._rank, self._progress = rank, progress
        self.folder = None if save is None else Path(save) / STATUS_FOLDER

    def write(self, cause: str, exit_code: int | None, message: str = "") -> None:
        """Replace what the file says; `exit_code` is None as long as the process lives. Raises StorageError."""
        if self.folder is None:
            return
        content = {
            "cause": cause,
            "rank": self._rank,
            "step": self._progress.step,
            "phase": self._progress.phase,
            "last_good": self._progress.last_good,
            "exit": exit_code,
            "message": message,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": time.time(),
        }
        write_atomically(self.folder / f"rank_{self._rank:05d}.json", json.dumps(content).encode())
