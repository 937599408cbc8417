"""Where a run starts: at random weights, at a step of --load, or at the weights of --pretrained-checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_metro.checkpoint.folder import RELEASE, find_step, read_document
from megatron_metro.config.errors import CheckpointError, ConfigError
from megatron_metro.config.fields import Value, list_settings
from megatron_metro.config.schema import CheckpointConfig
from megatron_metro.config.source import read_sections


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """The step a run reads; without one it starts from random weights."""

    step: Path | None = None
    document: Mapping[str, Any] = field(default_factory=dict)  # what the step says of the run that saved it
    is_new_run: bool = True  # takes weights alone and counts from 0

    @property
    def iteration(self) -> int:
        """Steps that are done already."""
        return 0 if self.is_new_run else int(self.document["train"]["iteration"])


def find_start(checkpoint: CheckpointConfig) -> Start:
    """What --load holds; while it holds nothing, the weights of --pretrained-checkpoint, if given.

    Raises CheckpointError where there is something that cannot be read.
    """
    pretrained = checkpoint.pretrained_checkpoint
    if checkpoint.load is not None:
        must_exist = checkpoint.exit_on_missing_checkpoint and pretrained is None
        step = find_step(replace(checkpoint, exit_on_missing_checkpoint=must_exist))
        if step is not None:
            return Start(
                step=step, document=read_document(step), is_new_run=checkpoint.finetune or step.name == RELEASE
            )
    if pretrained is None:
        return Start()
    step = _find_pretrained(Path(pretrained))
    return Start(step=step, document=read_document(step))


def read_saved_settings(checkpoint: CheckpointConfig) -> tuple[Mapping[str, Value], bool]:
    """Every setting, by field name, of the run that saved what this one starts from, and whether this one goes on.

    No settings where nothing is saved yet.
    """
    start = find_start(checkpoint)
    return {} if start.step is None else list_saved_settings(start.document), not start.is_new_run


def list_saved_settings(document: Mapping[str, Any]) -> dict[str, Value]:
    """The settings of the run that saved a step; those it did not know had no effect, which is their default's.

    Raises CheckpointError for values that no flag could have.
    """
    try:
        saved = read_sections(document.get("config", {}), "configuration in the checkpoint")
    except ConfigError as error:
        raise CheckpointError(f"{error}; choose another step") from error
    return {name: setting.default for name, setting in list_settings().items()} | saved


def _find_pretrained(folder: Path) -> Path:
    """The newest step of a run's folder, or the folder where it is a step itself."""
    if folder.name.startswith("iter_") or folder.name == RELEASE:
        return folder
    try:
        step = find_step(CheckpointConfig(load=str(folder), exit_on_missing_checkpoint=True))
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("--load", "--pretrained-checkpoint")) from error
    assert step is not None, "find_step raises where there is none"
    return step
