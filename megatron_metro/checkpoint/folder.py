"""The folders of checkpoints: naming, publishing, the tracker. Files only; no tensors and no other ranks.

A step is written under a temporary name, synced, renamed, and only then named in the tracker, so that a reader finds a
whole step or none at any moment.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_metro.config import files
from megatron_metro.config.errors import CheckpointError, first_line
from megatron_metro.config.schema import CheckpointConfig

TRACKER = "latest_checkpointed_iteration.txt"
STATE_VERSION = 1
_STATE_FILE = "state.json"


def step_folder(folder: Path, iteration: int) -> Path:
    """Where Megatron keeps the checkpoint of an iteration."""
    return folder / f"iter_{iteration:07d}"


def check_save_folder(save: str, start_iteration: int) -> None:
    """Refuse to start a run that would later meet an existing step; call before training.

    Raises CheckpointError when the folder already holds a step beyond the one the run starts from.
    """
    newest = max(_saved_iterations(Path(save)), default=0)
    if newest > start_iteration:
        raise CheckpointError(
            f"--save {save}: holds iteration {newest}, but this run starts at {start_iteration}; "
            f"load that step (--load {save} --ckpt-step {newest}), or save into another folder"
        )


def find_step(checkpoint: CheckpointConfig) -> Path | None:
    """The step folder that --load and --ckpt-step mean, or None where there is none to resume.

    Raises CheckpointError rather than start from scratch beside steps that were saved.
    """
    assert checkpoint.load is not None
    folder = Path(checkpoint.load)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"--load {folder}: is a file; name the folder that a run saved into")
    if (folder / _STATE_FILE).is_file():
        number = folder.name.removeprefix("iter_").lstrip("0") or "0"
        raise CheckpointError(f"--load {folder}: is one step; give --load {folder.parent} --ckpt-step {number}")
    iteration = checkpoint.ckpt_step if checkpoint.ckpt_step is not None else _read_tracker(folder)
    if iteration is None:
        if checkpoint.exit_on_missing_checkpoint:
            raise CheckpointError(f"--load {folder}: holds no {TRACKER}; name a folder that a run saved into")
        return None
    step = step_folder(folder, iteration)
    if not step.is_dir():
        saved = ", ".join(map(str, _saved_iterations(folder))) or "none"
        raise CheckpointError(f"{step}: does not exist (saved iterations: {saved}); choose one with --ckpt-step")
    return step


def prepare_step(final: Path, temporary: Path) -> None:
    """An empty folder under the temporary name. Raises CheckpointError when the step exists."""
    if final.exists():
        raise CheckpointError(f"{final}: exists already and is never overwritten; move it away or save elsewhere")
    if temporary.exists():  # left by a save that was cut short
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)


def publish(temporary: Path, final: Path, document: dict[str, Any]) -> None:
    """Make a complete step durable, then visible, then the one to resume from."""
    (temporary / _STATE_FILE).write_text(json.dumps(document, indent=1), encoding="utf-8")
    for file in temporary.iterdir():
        files.synchronise(file)
    files.publish(temporary, final)
    files.write_atomically(final.parent / TRACKER, str(document["train"]["iteration"]).encode())


def _saved_iterations(folder: Path) -> list[int]:
    names = (path.name.removeprefix("iter_") for path in folder.glob("iter_*"))
    return sorted(int(name) for name in names if name.isdecimal())


def _read_tracker(folder: Path) -> int | None:
    tracker = folder / TRACKER
    saved = _saved_iterations(folder)
    if not tracker.exists():
        if saved:
            raise CheckpointError(f"{tracker}: missing beside iteration {saved[-1]}; choose that one with --ckpt-step")
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal():
        raise CheckpointError(f"{tracker}: holds {text[:30]!r}, not a number; choose one of {saved} with --ckpt-step")
    return int(text)


def read_document(folder: Path) -> dict[str, Any]:
    """What `publish` wrote beside the tensors of a step. Raises CheckpointError."""
    path = folder / _STATE_FILE
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found, _ = document["version"], int(document["train"]["iteration"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not the state of a run ({first_line(error)}); choose another step") from error
    if found != STATE_VERSION:
        raise CheckpointError(f"{path}: version {found}, this program reads {STATE_VERSION}; use the one that saved it")
    return document
