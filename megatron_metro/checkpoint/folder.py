"""The folders of checkpoints: naming, publishing, choosing, deleting. Files only; no tensors and no other ranks.

A step is written under a temporary name, synchronised, given its manifest, renamed, and only then named in the tracker;
it is deleted under a temporary name as well. So a reader finds a whole step or none at any moment.
"""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_metro.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    list_files,
    read_manifest,
    verify_step,
    write_manifest,
)
from megatron_metro.config import files
from megatron_metro.config.errors import CheckpointError
from megatron_metro.config.schema import CheckpointConfig

LOGGER = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # in the tracker and as a folder: weights that no run of ours has saved, to start from at step 0
STATE_VERSION = 2
_PREVIOUS = "previous"  # of a manifest: what the tracker held before this step
_LEFTOVERS = ("iter_*.partial", "iter_*.deleted", f"{RELEASE}.*.partial", f".{TRACKER}.*.tmp")
_STEP = re.compile(r"iter_(\d{7}|[1-9]\d{7,})", re.ASCII)


def step_folder(folder: Path, iteration: int) -> Path:
    """Where Megatron keeps the checkpoint of an iteration."""
    return folder / f"iter_{iteration:07d}"


def list_iterations(folder: Path) -> list[int]:
    """The steps in a folder of checkpoints, damaged ones included, in order."""
    if not folder.is_dir():
        return []
    matches = (_STEP.fullmatch(entry.name) for entry in os.scandir(folder) if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def check_save_folder(checkpoint: CheckpointConfig, start_iteration: int) -> None:
    """Refuse to start a run that would later meet an existing step; call before training.

    Raises CheckpointError when --save already holds a step beyond the one the run starts from, unless that is one of
    the damaged steps that `set_aside_damaged` will rename.
    """
    if checkpoint.save is None or _passes_over_own_steps(checkpoint):
        return
    newest = max(list_iterations(Path(checkpoint.save)), default=0)
    if newest > start_iteration:
        raise CheckpointError(
            f"--save {checkpoint.save}: holds iteration {newest}, but this run starts at {start_iteration}; "
            f"load that step (--load {checkpoint.save} --ckpt-step {newest}), or save into another folder"
        )


def set_aside_damaged(checkpoint: CheckpointConfig, start_iteration: int) -> None:
    """Rename the steps that --skip-damaged-checkpoints passed over, since the run will come to save them again."""
    if not _passes_over_own_steps(checkpoint):
        return
    assert checkpoint.save is not None
    folder = Path(checkpoint.save)
    later = [n for n in list_iterations(folder) if n > start_iteration]
    if later:  # first, so that the tracker names a whole step at any moment
        _write_tracker(folder, start_iteration)
    for iteration in later:
        step = step_folder(folder, iteration)
        aside = Path(tempfile.mkdtemp(prefix=f"{step.name}.", suffix=".damaged", dir=folder))
        files.publish(step, aside)  # an empty folder may be replaced
        LOGGER.warning("%s: damaged, now called %s", step, aside.name)


def find_step(checkpoint: CheckpointConfig) -> Path | None:
    """The step folder that --load and --ckpt-step mean, or None where there is none to resume.

    Its manifest is whole and all files are there with their sizes; contents are compared when they are loaded
    (`verify_contents`), and here where --skip-damaged-checkpoints makes the choice depend on them. Raises
    CheckpointError rather than start from scratch beside steps that were saved.
    """
    assert checkpoint.load is not None
    folder = Path(checkpoint.load)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"--load {folder}: is a file; name the folder that a run saved into")
    if (folder / MANIFEST).is_file():
        number = folder.name.removeprefix("iter_").lstrip("0") or "0"
        raise CheckpointError(f"--load {folder}: is one step; give --load {folder.parent} --ckpt-step {number}")
    if checkpoint.ckpt_step is not None:
        step: Path | None = _existing_step(folder, checkpoint.ckpt_step)
    elif checkpoint.skip_damaged_checkpoints and list_iterations(folder):
        step = _find_newest_whole(folder)
    else:
        step = _find_newest(folder)
    if step is None:
        if checkpoint.exit_on_missing_checkpoint:
            raise CheckpointError(f"--load {folder}: holds no {TRACKER}; name a folder that a run saved into")
        return None
    list_files(step)
    return step


def read_document(folder: Path) -> dict[str, Any]:
    """What `publish` wrote beside the tensors of a step. Raises CheckpointError."""
    document = read_manifest(folder)
    try:
        found, iteration = document["version"], int(document["train"]["iteration"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: not the state of a run; choose another step") from error
    if found != STATE_VERSION:
        raise CheckpointError(
            f"{folder / MANIFEST}: version {found}, this program reads {STATE_VERSION}; use the one that saved it"
        )
    match = _STEP.fullmatch(folder.name)
    if match and int(match[1]) != iteration:
        raise CheckpointError(f"{folder}: holds iteration {iteration}; give the folder its own name again")
    return document


def prepare_step(final: Path) -> Path:
    """An empty folder under a temporary name that no other process knows; what earlier saves left is removed.

    Raises CheckpointError when the step exists.
    """
    if final.exists():
        raise CheckpointError(f"{final}: exists already and is never overwritten; move it away or save elsewhere")
    final.parent.mkdir(parents=True, exist_ok=True)
    for pattern in _LEFTOVERS:
        for leftover in final.parent.glob(pattern):
            discard(leftover)
    temporary = Path(tempfile.mkdtemp(prefix=f"{final.name}.", suffix=".partial", dir=final.parent))
    temporary.chmod(0o777 & ~files.current_umask())
    return temporary


def discard(temporary: Path) -> None:
    """Remove a temporary folder or file with what it holds, as far as the file system lets us."""
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)


def publish(
    temporary: Path, final: Path, document: Mapping[str, Any], known: Mapping[str, FileRecord] | None = None
) -> None:
    """Make a complete step, or released weights, durable, then visible, then what is loaded next.

    `known` holds the files that were synchronised and hashed as they were written. The first error is the end of it:
    after a failed fsync nobody knows what is on the disk. Raises OSError.
    """
    try:
        previous = read_tracker(final.parent)
    except CheckpointError:
        previous = None  # damaged since the run started; it is replaced below
    write_manifest(temporary, {**document, _PREVIOUS: previous}, known)
    files.publish(temporary, final)
    _write_tracker(final.parent, RELEASE if final.name == RELEASE else document["train"]["iteration"])


def list_expendable(checkpoint: CheckpointConfig, newest: int) -> list[Path]:
    """Steps that --save-retain-interval and --keep-last let go once step `newest` is verified."""
    interval, keep_last = checkpoint.save_retain_interval, checkpoint.keep_last
    if checkpoint.save is None or (interval is None and keep_last is None):
        return []
    folder = Path(checkpoint.save)
    earlier = [n for n in list_iterations(folder) if n < newest]
    num_kept = (keep_last or 1) - 1  # beside the newest
    candidates = earlier[: len(earlier) - num_kept] if num_kept < len(earlier) else []
    return [step_folder(folder, n) for n in candidates if interval is None or n % interval != 0]


def delete_step(step: Path) -> None:
    """Delete a step; from the first moment no reader takes what is left of it for a step. Raises OSError."""
    doomed = step.with_name(f"{step.name}.deleted")
    files.publish(step, doomed)
    shutil.rmtree(doomed)


def _passes_over_own_steps(checkpoint: CheckpointConfig) -> bool:
    """Whether --load chose among the steps of --save, and what is newer than its choice was found to be damaged."""
    if checkpoint.load is None or checkpoint.save is None or checkpoint.ckpt_step is not None or checkpoint.finetune:
        return False
    return checkpoint.skip_damaged_checkpoints and Path(checkpoint.load).resolve() == Path(checkpoint.save).resolve()


def _find_newest(folder: Path) -> Path | None:
    """The step that the tracker names, which is the newest one, or None where nothing was saved.

    A save that was cut short between the two renames leaves the tracker at what it held before; the newest step, which
    knows that, is whole and durable then, and is the one. All else is refused: it could be a damaged tracker.
    """
    announced, saved = read_tracker(folder), list_iterations(folder)
    if not saved:
        if announced is None:
            if (folder / RELEASE).is_dir():
                raise CheckpointError(f"{folder / TRACKER}: missing beside {RELEASE}; write that word into it")
            return None
        return _existing_step(folder, announced)
    newest = step_folder(folder, saved[-1])
    if announced == str(saved[-1]):
        return newest
    if announced is not None:
        _existing_step(folder, announced)
    if read_document(newest).get(_PREVIOUS) == announced:
        return newest
    found = "missing" if announced is None else f"names {announced}"
    raise CheckpointError(f"{folder / TRACKER}: {found} beside iteration {saved[-1]}; choose one with --ckpt-step")


def _find_newest_whole(folder: Path) -> Path:
    """The newest step whose manifest and files verify; those passed over are named."""
    for iteration in reversed(list_iterations(folder)):
        step = step_folder(folder, iteration)
        try:
            verify_step(step)
            read_document(step)
        except CheckpointError as error:
            LOGGER.warning("--skip-damaged-checkpoints passes over a step: %s", error)
            continue
        return step
    raise CheckpointError(f"--load {folder}: no step of it is whole; load another folder, or none to start anew")


def _existing_step(folder: Path, name: int | str) -> Path:
    step = folder / RELEASE if name == RELEASE else step_folder(folder, int(name))
    if not step.is_dir():
        saved = ", ".join(map(str, list_iterations(folder))) or "none"
        raise CheckpointError(f"{step}: does not exist (saved iterations: {saved}); choose one with --ckpt-step")
    return step


def read_tracker(folder: Path) -> str | None:
    """A number without leading zeros, or `release`; None where there is no tracker. Raises CheckpointError."""
    tracker = folder / TRACKER
    try:
        with tracker.open("rb") as file:
            content = file.read(64)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{tracker}: cannot be read ({error.strerror}); give --ckpt-step") from error
    text = content.decode("ascii", errors="replace").removesuffix("\n")
    if text != RELEASE and not re.fullmatch("0|[1-9][0-9]{0,17}", text):
        saved = list_iterations(folder)
        raise CheckpointError(f"{tracker}: holds {text[:30]!r}, not a number; choose one of {saved} with --ckpt-step")
    return text


def _write_tracker(folder: Path, iteration: int | str) -> None:
    files.write_atomically(folder / TRACKER, str(iteration).encode())
