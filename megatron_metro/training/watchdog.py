"""Threads that watch over a job of several ranks while its main threads train.

Every rank shows its progress in the job's store. A rank whose own main thread has not moved for the time limit looks at
all of them and blames, in this order: ranks that give no sign of life, ranks that are behind in a phase (still in the
data while others wait for their gradients), ranks that compute where others wait. A process that has ended is seen by
the ranks of its machine within a second. The first verdict stands in the store; everybody heeds it: status file, stacks
for a hang, one line, exit code 78.

All ranks stand still when one does, so each looks at the others only then, and nobody has to watch all. What was
considered instead: a rank that reads everybody's progress all the time (traffic that grows with the job, and it may
itself be the one that hangs), and helper processes (which cannot see what the main thread waits for).
"""

import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from statistics import median
from typing import Any, TextIO

from megatron_metro.config.errors import PeerError, StorageError
from megatron_metro.parallel.groups import ParallelGroups, is_store_in_launcher
from megatron_metro.parallel.side_channel import SideChannel
from megatron_metro.training.status import LAST_PHASE, Progress, StatusFile

SAMPLE_SECONDS = 0.1
EXCHANGE_SECONDS = 0.5
# After a verdict ranks that come to an end by themselves may do so: an error all have in common keeps its exit code.
GRACE_SECONDS = 2.5
# A main thread that is leaving may be held up by a collective library that waits for lost peers.
LEAVE_SECONDS = 10.0
# A loop that holds Python's lock stops the threads below too; the interpreter's own timer, a thread in C, ends it.
LOCKED_SECONDS = 10.0
# Files in whose lines a main thread waits for other ranks.
_WAITING_PLACES = (
    "/torch/distributed/distributed_c10d.py",
    "/pipeline_parallel/p2p_communication.py",
    "/core/distributed/param_and_grad_buffer.py",
    "/parallel/communicator.py",
)
LEAST_SAMPLES = 20
BUSY_SHARE, WAITING_SHARE = 0.25, 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """What a rank shows of itself."""

    number: int
    num_phases: int
    phase: str
    step: int
    waits: bool  # its main thread is in a collective


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Why the job ends; by the rank that found it first."""

    by: int
    text: str
    culprits: tuple[int, ...]
    is_hang: bool = False


def find_silent(changed_at: Mapping[int, float], world_size: int, since: float) -> list[int]:
    """Ranks that have shown nothing new since then; one that never came to its first beat is not in `changed_at`."""
    return [rank for rank in range(world_size) if changed_at.get(rank, -math.inf) < since]


def find_culprits(beats: Mapping[int, Beat], silent: Collection[int]) -> tuple[list[int], str]:
    """The ranks for which all others wait, and what is wrong with them; none where all wait for each other."""
    if not beats:
        return [], "nothing was heard of any rank"
    if silent:
        return sorted(silent), "gave no sign of life: stopped, cut off, or in a loop that holds Python's lock"
    least = min(beat.num_phases for beat in beats.values())
    behind = {rank: beat for rank, beat in beats.items() if beat.num_phases == least}
    busy = sorted(rank for rank, beat in behind.items() if not beat.waits)
    if busy:
        return busy, "did not come to where the others wait"
    if len(behind) < len(beats):
        return sorted(behind), "waited elsewhere than the others"
    return [], "all ranks waited for each other"


def find_slow(samples: Sequence[tuple[int, int]]) -> list[int]:
    """Ranks that hardly waited while the others mostly did, from (samples, those of them waiting) of each rank."""
    shares = [waiting / total for total, waiting in samples]
    slow = [rank for rank, share in enumerate(shares) if share <= BUSY_SHARE]
    others = [share for share in shares if share > BUSY_SHARE]
    return slow if others and median(others) >= WAITING_SHARE else []


class Watchdog:
    """Watches from `start` to `stop`; both are called by all ranks together."""

    def __init__(self, groups: ParallelGroups, progress: Progress, status: StatusFile) -> None:
        self._rank, self._world_size = groups.rank, groups.world_size
        self._progress, self._status = progress, status
        self.limit_seconds = groups.timeout.total_seconds()
        self.exit_code = PeerError.exit_code  # with which a process ends that cannot leave
        self._main = threading.main_thread().ident
        self._is_over = threading.Event()
        self._verdict: Verdict | None = None
        self._lost: list[int] = []
        self._beats: dict[int, Beat] = {}
        self._changed_at: dict[int, float] = {}
        self._exchanged_at = time.monotonic()
        self._is_store_lost = False
        self._num_samples = self._num_waiting = 0
        self._threads: list[threading.Thread] = []
        self._stacks: TextIO | None = None

    def start(self) -> None:
        """Begin to watch. Collective."""
        self._channel = SideChannel(timedelta(seconds=60))
        mine = self._channel.processes[self._rank]
        # Ids mean nothing in another container, even of the same host name.
        self._neighbours = {
            rank: process
            for rank, process in enumerate(self._channel.processes)
            if rank != self._rank and process.machine == mine.machine and process.is_alive()
        }
        if self._status.folder is not None:
            self._status.folder.mkdir(parents=True, exist_ok=True)
            self._stacks = (self._status.folder / f"stacks_{self._rank:05d}.txt").open("w", encoding="utf-8")
        self._progress.tick()
        self._threads = [
            threading.Thread(target=target, name=f"watch {target.__name__}", daemon=True)
            for target in (self._exchange, self._judge)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads; a file of stacks remains only if there are any."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(LEAVE_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        if self._stacks is not None:
            self._stacks.close()
            path = self._stacks.name
            if os.path.exists(path) and os.path.getsize(path) == 0:
                os.unlink(path)

    def announce(self, text: str) -> None:
        """Tell all other ranks why this one ends; the first word of any rank stands."""
        self._agree(Verdict(by=self._rank, text=text, culprits=(self._rank,)))
        self._let_others_read()

    def explain(self, error: BaseException) -> str:
        """Why a collective has failed on this rank: waits a moment for what others know."""
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            if self._verdict is not None:
                return self._verdict.text
            if self._lost:
                return self._agree(self._describe_lost(self._lost)).text
            time.sleep(SAMPLE_SECONDS / 2)
        line = " ".join(str(error).split())[:200]
        place = f"iteration {self._progress.step}, phase {self._progress.phase}"
        return f"another rank cannot be reached after {place} ({line}); look at what the other ranks say"

    def end(self, text: str, *, is_hang: bool = False) -> None:
        """End this process because of another one; does not return."""
        if is_hang:
            faulthandler.dump_traceback(self._stacks or sys.stderr, all_threads=True)
        self._let_others_read()
        with suppress(StorageError):
            self._status.write("peer", PeerError.exit_code, text)
        leave_at_once(text, PeerError.exit_code)

    def take_samples(self) -> tuple[int, int]:
        """Looks at the main thread since `forget_samples`, and how many of them found it waiting."""
        return self._num_samples, self._num_waiting

    def forget_samples(self) -> None:
        """Begin a new count."""
        self._num_samples = self._num_waiting = 0

    def _let_others_read(self) -> None:
        """A store in this process goes with it."""
        if self._rank == 0 and not is_store_in_launcher():
            time.sleep(2 * EXCHANGE_SECONDS)

    def _exchange(self) -> None:
        """Show this rank's progress and read what the others say; blocks while the store does."""
        number = 0
        while not self._is_over.wait(EXCHANGE_SECONDS):
            number += 1
            progress = self._progress
            beat = Beat(
                number=number,
                num_phases=progress.num_phases,
                phase=progress.phase,
                step=progress.step,
                waits=self._is_waiting(),
            )
            try:
                self._channel.put(f"beat/{self._rank}", json.dumps(asdict(beat)))
                [found] = self._channel.get(["verdict"])
                if found and self._verdict is None:
                    self._verdict = _read_verdict(found)
                if self._stalled_seconds() > self.limit_seconds - self._look_seconds():
                    self._read_beats()
                else:
                    self._beats.clear()
            except ConnectionError:
                self._is_store_lost = True  # for ever: it went with its process
                return
            self._exchanged_at = time.monotonic()
            locked = self.limit_seconds + LOCKED_SECONDS
            faulthandler.dump_traceback_later(locked, exit=True, file=self._stacks or sys.stderr)

    def _read_beats(self) -> None:
        for rank, text in enumerate(self._channel.get([f"beat/{rank}" for rank in range(self._world_size)])):
            if text:
                beat = Beat(**json.loads(text))
                if rank not in self._beats or beat.number != self._beats[rank].number:
                    self._changed_at[rank] = time.monotonic()
                self._beats[rank] = beat

    def _judge(self) -> None:
        """Look at the main thread, at the processes of this machine and at the clock."""
        rounds, verdict_at, leaving_at = 0, 0.0, 0.0
        while not self._is_over.wait(SAMPLE_SECONDS):
            rounds += 1
            now = time.monotonic()
            self._num_samples += 1
            self._num_waiting += self._is_waiting()
            if rounds % 5 == 0:
                self._lost = [rank for rank, process in self._neighbours.items() if not process.is_alive()]
            if self._progress.is_leaving:
                leaving_at = leaving_at or now
                if now - leaving_at > LEAVE_SECONDS:
                    leave_at_once(None, self.exit_code)
                continue
            # At the end others may go first.
            has_lost = (self._lost or self._is_store_lost) and self._progress.phase != LAST_PHASE
            if self._verdict is None and has_lost:
                # A rank may have said why before it ended.
                verdict_at = verdict_at or now
                if now - verdict_at > 2 * EXCHANGE_SECONDS:
                    self._agree(self._describe_lost(self._lost))
            if self._verdict is None and self._stalled_seconds() > self.limit_seconds:
                self._agree(self._describe_hang())
            if self._verdict is not None:
                verdict_at = verdict_at or now
                if self._verdict.is_hang or now - verdict_at > GRACE_SECONDS:
                    self.end(self._verdict.text, is_hang=self._verdict.is_hang)

    def _describe_lost(self, lost: list[int]) -> Verdict:
        if not lost:
            text = f"{self._name_store()} ended without a word after {self._place()}: the job's store is gone"
            return Verdict(by=self._rank, text=text, culprits=(0,))
        names = _join([f"{rank} (pid {self._neighbours[rank].pid} on {self._neighbours[rank].host})" for rank in lost])
        return Verdict(
            by=self._rank,
            text=f"rank {names} ended without a word after {self._place()}: killed, perhaps for lack of memory, or "
            "crashed; all ranks stop, start again with --load",
            culprits=tuple(lost),
        )

    def _describe_hang(self) -> Verdict:
        now, look = time.monotonic(), self._look_seconds()
        limit = f"for {self.limit_seconds:g} s (--distributed-timeout-minutes, -seconds-after-init)"
        if now - self._exchanged_at > look / 2:
            text = (
                f"{self._name_store()} gave no sign of life after {self._place()}, {limit}: the job's store is silent"
            )
            return Verdict(by=self._rank, text=text, culprits=(0,), is_hang=True)
        beats = self._beats
        silent = find_silent({rank: self._changed_at[rank] for rank in beats}, self._world_size, now - look / 2)
        culprits, what = find_culprits(beats, silent)
        who = f"rank {_join([self._name(rank) for rank in culprits])} {what}" if culprits else what
        folder = self._status.folder
        text = f"{who} {limit}; stacks of all ranks are in {folder if folder is not None else 'their standard errors'}"
        return Verdict(by=self._rank, text=text, culprits=tuple(culprits), is_hang=True)

    def _name_store(self) -> str:
        """Who holds the job's store."""
        process = self._channel.processes[0]
        return "torchrun" if is_store_in_launcher() else f"rank 0 (pid {process.pid} on {process.host})"

    def _name(self, rank: int) -> str:
        process, beat = self._channel.processes[rank], self._beats.get(rank)
        place = f", last seen in phase {beat.phase} after iteration {beat.step}" if beat is not None else ""
        return f"{rank} (pid {process.pid} on {process.host}{place})"

    def _agree(self, verdict: Verdict) -> Verdict:
        """The verdict of whoever spoke first; this one if the store does not answer."""
        first = [verdict]

        def say() -> None:
            with suppress(ConnectionError):
                first[0] = _read_verdict(self._channel.put_first("verdict", json.dumps(asdict(verdict))))

        thread = threading.Thread(target=say, daemon=True)
        thread.start()
        thread.join(2 * EXCHANGE_SECONDS)
        self._verdict = self._verdict or first[0]
        return self._verdict

    def _stalled_seconds(self) -> float:
        return time.monotonic() - self._progress.moved_at

    def _look_seconds(self) -> float:
        """How long before the limit the others' progress is looked at: signs of life are to be seen meanwhile."""
        return min(10.0, self.limit_seconds / 2)

    def _place(self) -> str:
        return f"iteration {self._progress.step}, phase {self._progress.phase}"

    def _is_waiting(self) -> bool:
        frame = sys._current_frames().get(self._main or 0)
        return frame is not None and any(place in frame.f_code.co_filename for place in _WAITING_PLACES)


def leave_at_once(text: str | None, exit_code: int) -> None:
    """End the process with one line, whatever its other threads do; does not return."""
    with suppress(OSError, ValueError):
        if text is not None:
            sys.stderr.write(f"error: {' '.join(text.splitlines())}\n")
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)


def _read_verdict(text: str) -> Verdict:
    values: dict[str, Any] = json.loads(text)
    return Verdict(**{**values, "culprits": tuple(values["culprits"])})


def _join(names: Sequence[str]) -> str:
    return " and ".join(names)
