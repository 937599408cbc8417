"""Tools as real processes without paying for their imports each time: one process loads everything once and forks.

The server (`python -m tests.helpers.tool_server`) reads JSON lines, forks a child per command and answers with its
process id, later with its exit code. A child is what `python tools/NAME.py FLAGS` would be, with its own environment.
"""

import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.distributed import free_port
from tests.helpers.line_server import LineServer
from tests.helpers.repository import ROOT

GROUP_STARTED = 99  # exit code of a child that started a process group where none was to be started
TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolRun:
    """How a command ended."""

    code: int | None  # None: it had to be killed after the time limit
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line on standard error."""
        [line] = self.err.splitlines()
        assert line.startswith("error: "), self.err
        return line


class StartedTool:
    """A command that runs."""

    def __init__(self, server: "ToolServer", pid: int, stem: Path) -> None:
        self.pid = pid
        self._server = server
        self._stem = stem

    def list_children(self) -> list[int]:
        """Process ids of its workers."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def finish(self) -> ToolRun:
        """Wait for its end."""
        code = self._server.ask({"wait": self.pid})
        out, err = (self._stem.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
        return ToolRun(code=code, out=out, err=err)


class ToolServer(LineServer):
    """Starts commands; use it as a context."""

    def __init__(self, folder: Path) -> None:
        super().__init__("tests.helpers.tool_server", TIMEOUT_SECONDS)
        self._folder = folder
        self._count = 0

    def start(
        self, tool: str, *flags: object, environment: dict[str, str] | None = None, may_start_groups: bool = True
    ) -> StartedTool:
        """Start `python tools/<tool>.py <flags>`."""
        self._count += 1
        stem = self._folder / f"run{self._count}"
        pid = self.ask(
            {
                "tool": tool,
                "flags": [str(flag) for flag in flags],
                "environment": environment or {},
                "may_start_groups": may_start_groups,
                "stem": str(stem),
            }
        )
        assert pid is not None
        return StartedTool(self, pid, stem)

    def run(self, tool: str, *flags: object) -> ToolRun:
        """Start and wait."""
        return self.start(tool, *flags).finish()

    def run_ranks(
        self,
        tool: str,
        *flags: object,
        world_size: int,
        may_start_groups: bool = True,
        last_flags: Sequence[object] = (),
    ) -> list[ToolRun]:
        """The same command on all ranks of a job at once, as torchrun would start it; the last rank has more flags."""
        port = free_port()
        job = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started = [
            self.start(
                tool,
                *flags,
                *(last_flags if rank == world_size - 1 else ()),
                environment={**job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                may_start_groups=may_start_groups,
            )
            for rank in range(world_size)
        ]
        return [one.finish() for one in started]


def serve() -> None:
    """Fork until standard input ends."""
    import torch.distributed

    import megatron_metro.data.inspection
    import megatron_metro.data.preprocess
    import megatron_metro.training.loop  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = _wait(request["wait"])
        elif (answer := os.fork()) == 0:
            if not request["may_start_groups"]:
                torch.distributed.init_process_group = lambda *_args, **_options: os._exit(GROUP_STARTED)
            _become(request["tool"], request["flags"], request["environment"], Path(request["stem"]))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _wait(pid: int) -> int | None:
    """The exit code of a child, as a shell reports it; a child that takes too long is killed."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _become(tool: str, flags: Sequence[str], environment: dict[str, str], stem: Path) -> None:
    """Run the tool in this process and end it; never returns."""
    code = 1
    try:
        for descriptor, path in ((0, os.devnull), (1, stem.with_suffix(".out")), (2, stem.with_suffix(".err"))):
            opened = os.open(path, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT)
            os.dup2(opened, descriptor)
            os.close(opened)
        # As at a terminal: a shell that starts the tests in the background lets all of them ignore the interrupt.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(environment)
        sys.argv = [f"tools/{tool}.py", *flags]
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 (a child must never return into the server)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
