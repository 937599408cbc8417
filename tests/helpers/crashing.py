"""Saves of the publish protocol alone, cut short anywhere, and what is expected of the folder afterwards."""

import contextlib
import hashlib
import json
import os
import random
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_metro.checkpoint.folder import (
    STATE_VERSION,
    delete_step,
    find_step,
    list_expendable,
    prepare_step,
    publish,
    read_document,
    step_folder,
)
from megatron_metro.checkpoint.manifest import MANIFEST, hash_file, verify_step
from megatron_metro.config import files
from megatron_metro.config.errors import CheckpointError
from megatron_metro.config.schema import CheckpointConfig
from tests.helpers.file_operations import kill_at, kill_self, watch
from tests.helpers.line_server import LineServer
from tests.helpers.power_loss import Operation

TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Save:
    """One attempt to save a step; what it writes is a function of it."""

    iteration: int
    attempt: int
    num_shards: int = 2
    keep_last: int | None = None
    save_retain_interval: int | None = None

    def contents(self) -> dict[str, bytes]:
        generator = random.Random(f"{self.iteration} {self.attempt}")
        names = [".metadata", *(f"__{rank}_0.distcp" for rank in range(self.num_shards))]
        return {name: generator.randbytes(generator.randrange(400)) for name in names}

    def config(self, folder: Path) -> CheckpointConfig:
        return CheckpointConfig(
            save=str(folder), keep_last=self.keep_last, save_retain_interval=self.save_retain_interval
        )

    def run(self, folder: Path) -> None:
        """What `training/saving.py` does, with random bytes for tensors. Raises CheckpointError."""
        final = step_folder(folder, self.iteration)
        temporary, known = prepare_step(final), {}
        for name, content in self.contents().items():
            (temporary / name).write_bytes(content)
            if name.endswith(".distcp"):
                files.synchronise(temporary / name)
                known[name] = hash_file(temporary / name)
        publish(temporary, final, self.document(), known)

    def document(self) -> dict:
        return {"version": STATE_VERSION, "train": {"iteration": self.iteration}, "attempt": self.attempt}

    def let_go(self, folder: Path) -> None:
        if expendable := list_expendable(self.config(folder), self.iteration):
            verify_step(step_folder(folder, self.iteration))
            for step in expendable:
                delete_step(step)

    def may_delete(self, iterations: set[int]) -> set[int]:
        """The rule in the words of `--help`, without the library's code."""
        if self.keep_last is None and self.save_retain_interval is None:
            return set()
        newest = sorted(iterations)[-(self.keep_last or 1) :]
        every = self.save_retain_interval
        return {n for n in iterations if n not in newest and (every is None or n % every)}


@dataclass(slots=True)
class Model:
    """What has been promised of a folder."""

    folder: Path
    saver: "SaveServer"
    announced: dict[int, Save] = field(default_factory=dict)
    attempts: list[Save] = field(default_factory=list)
    num_mixed: int = 0

    def save_killed_at(self, save: Save, index: int) -> bool:
        """Run a save in a process that is killed before its `index`-th operation; whether it was killed."""
        self.attempts.append(save)
        is_announced, code = self.saver.ask({"save": asdict(save), "folder": str(self.folder), "index": index})
        assert code in (0, -9), code
        if is_announced:
            self.announced[save.iteration] = save
        for iteration in save.may_delete(set(self.announced)) if is_announced else ():
            if not step_folder(self.folder, iteration).exists():
                del self.announced[iteration]
        return code != 0

    def check(self) -> None:
        """Every step in the folder is one attempt's, whole; none that was announced is lost; the newest is chosen."""
        whole = {}
        for step in self.folder.glob("iter_???????"):
            verify_step(step)
            document = read_document(step)
            found = {path.name: path.read_bytes() for path in step.iterdir() if path.name != MANIFEST}
            [save] = [save for save in self.attempts if save.document().items() <= document.items()]
            assert found == save.contents(), f"{step.name} is mixed"
            for name, content in found.items():
                assert document["files"][name]["sha256"] == hashlib.sha256(content).hexdigest()
            whole[save.iteration] = save
        lost = self.announced.keys() - whole.keys()
        assert not lost, f"announced and lost: {sorted(lost)}"
        assert all(whole[n] == save for n, save in self.announced.items()), "an announced step was replaced"
        chosen = find_step(CheckpointConfig(load=str(self.folder)))
        assert chosen == (step_folder(self.folder, max(whole)) if whole else None)
        # Published, though the process did not live to say so.
        self.announced |= {n: save for n, save in whole.items() if n > max(self.announced, default=-1)}

    def save_whole(self, save: Save) -> None:
        """Nothing of what a crash left stands in the way of the next save, or stays."""
        assert not self.save_killed_at(save, -1)
        assert save.iteration in self.announced
        self.check()
        names = {step_folder(self.folder, n).name for n in self.announced} | {"latest_checkpointed_iteration.txt"}
        assert {path.name for path in self.folder.iterdir()} == names


class SaveServer(LineServer):
    """Forks the processes that save. It has not loaded torch: a fork costs what its parent holds."""

    def __init__(self) -> None:
        super().__init__("tests.helpers.crashing", TIMEOUT_SECONDS)


def serve() -> None:
    """Answer each attempt with [whether its step was announced, the exit code of its process]."""
    for line in sys.stdin:
        attempt = json.loads(line)
        heard, told = os.pipe()
        if (child := os.fork()) == 0:
            _become_saver(Save(**attempt["save"]), Path(attempt["folder"]), attempt["index"], told)
        os.close(told)
        with os.fdopen(heard, "rb") as pipe:
            is_announced = pipe.read() == b"announced"
        _, status = os.waitpid(child, 0)
        print(json.dumps([is_announced, os.waitstatus_to_exitcode(status)]), flush=True)


def _become_saver(save: Save, folder: Path, index: int, told: int) -> None:
    with contextlib.suppress(BaseException):
        kill_at(folder, index, kill_self)
        with contextlib.suppress(CheckpointError):  # the step exists already
            save.run(folder)
            os.write(told, b"announced")
            save.let_go(folder)
        os._exit(0)
    os._exit(1)


def record_saves(saves: list[Save], folder: Path, trace: Path) -> list[Operation]:
    """All operations of whole saves into an empty folder, and when each step was announced."""
    if (child := os.fork()) == 0:
        _become_recorder(saves, folder, trace)
    assert os.waitpid(child, 0)[1] == 0
    lines = map(json.loads, trace.read_text().splitlines())
    return [Operation(name=name, paths=tuple(paths), content=_decode(content)) for name, paths, content in lines]


def _decode(content: str | None) -> bytes | None:
    return None if content is None else bytes.fromhex(content)


def _become_recorder(saves: list[Save], folder: Path, trace: Path) -> None:
    with contextlib.suppress(BaseException):
        with trace.open("w") as file:

            def tell(operation: str, paths: list[Path]) -> None:
                is_content = operation == "fsync" and paths[0].is_file()
                content = paths[0].read_bytes().hex() if is_content else None
                relative = [os.path.relpath(path, os.path.realpath(folder)) for path in paths]
                file.write(json.dumps([operation, relative, content]) + "\n")

            watch(folder, tell)
            for save in saves:
                save.run(folder)
                file.write(json.dumps(["announce", [str(save.iteration)], None]) + "\n")
                save.let_go(folder)
        os._exit(0)
    os._exit(1)


if __name__ == "__main__":
    serve()
