"""When a run is to stop before its end: a signal has come, or its time is over. Ranks agree on the step elsewhere."""

import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Launchers and shells send one wish twice: to the process and to its group.
SAME_SIGNAL_SECONDS = 1.0


class StopRequest:
    """What this process has been asked; signals are watched between `install` and `restore`.

    A thread reads them as they come, so a second one ends a process whose main thread waits in a collective too.
    `on_second` is called there with the signal's name and number and does not return.
    """

    def __init__(self, minutes: float | None, on_second: Callable[[str, int], None]) -> None:
        self._deadline = None if minutes is None else time.monotonic() + 60.0 * minutes
        self._on_second = on_second
        self._first: tuple[str, float] | None = None
        self._former: dict[int, Any] = {}
        self._sockets: tuple[socket.socket, socket.socket] | None = None

    @property
    def signal_name(self) -> str | None:
        """The signal that has come first, as SIGTERM."""
        return self._first and self._first[0]

    def is_wanted(self) -> bool:
        """Whether this process wants all to stop after the step in progress."""
        return self._first is not None or (self._deadline is not None and time.monotonic() >= self._deadline)

    def install(self) -> None:
        """Watch for signals; on the main thread."""
        assert self._sockets is None, "installed already"
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._sockets = reader, writer
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
        # The interpreter writes the number of every signal with a handler, whatever the main thread does.
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._former = {number: signal.signal(number, _leave_to_thread) for number in SIGNALS}

    def restore(self) -> None:
        """Put back the handlers that were there."""
        if self._sockets is None:
            return
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        reader, writer = self._sockets
        self._sockets = None
        writer.close()  # which ends the thread
        reader.close()

    def _listen(self, reader: socket.socket) -> None:
        while True:
            try:
                numbers = reader.recv(64)
            except OSError:
                return
            if not numbers:
                return
            for number in numbers:
                if number in SIGNALS:
                    self._receive(number)

    def _receive(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self._first is None:
            self._first = name, now
        elif now - self._first[1] >= SAME_SIGNAL_SECONDS:
            self._on_second(name, number)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """The thread has been told already."""
