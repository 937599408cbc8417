"""The file of answers: it has its name only when it is whole, and one that was cut short is gone on with."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_metro.config.errors import ConfigError, DataError
from megatron_metro.config.files import publish, temporary_sibling


class AnswerFile:
    """Lines that gather in `<path>.partial`, whose first line says of what job they are."""

    def __init__(self, path: Path, job: dict[str, Any]) -> None:
        self.path, self._partial = path, path.with_name(path.name + ".partial")
        self._head = json.dumps(job, sort_keys=True).encode() + b"\n"

    def resume(self) -> int:
        """How many answers there are already; makes the file.

        Raises ConfigError where the final file exists, DataError where a partial one belongs to another job.
        """
        if self.path.exists():
            raise ConfigError(f"--output {self.path}: exists already; move it away or choose another name")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = self._partial.read_bytes() if self._partial.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # the last line may have been cut
        if not whole:
            self._partial.write_bytes(self._head)
            return 0
        if not whole.startswith(self._head):
            raise DataError(
                f"{self._partial}: was begun with another input, model or other flags; remove it, or choose another "
                "--output"
            )
        with self._partial.open("r+b") as file:
            file.truncate(len(whole))
        return whole.count(b"\n") - 1

    def append(self, lines: Sequence[str]) -> None:
        """Answers in the order of their requests, durable when this returns."""
        with self._partial.open("ab") as file:
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def publish(self) -> None:
        """Give all answers their final name."""
        with temporary_sibling(self.path) as temporary:
            with self._partial.open("rb") as source, temporary.open("wb") as target:
                source.readline()
                for line in source:
                    target.write(line)
            publish(temporary, self.path)
        self._partial.unlink()
