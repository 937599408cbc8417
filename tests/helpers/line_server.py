"""A process that has loaded everything once and answers one JSON line with another; tests ask it to fork."""

import json
import os
import subprocess
import sys
from typing import Any

from tests.helpers.repository import ROOT


class LineServer:
    """Runs `python -m <module>`; use it as a context. It ends when its standard input does."""

    def __init__(self, module: str, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=self._timeout_seconds)

    def ask(self, request: dict[str, Any]) -> Any:
        """One request, one answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())
