"""Where a run starts: what --load holds, then --pretrained-checkpoint, then nothing; and the saved settings."""

import dataclasses
from pathlib import Path

import pytest

from megatron_metro.checkpoint.folder import STATE_VERSION, prepare_step, publish, step_folder
from megatron_metro.checkpoint.start import find_start, list_saved_settings, read_saved_settings
from megatron_metro.config.errors import CheckpointError
from megatron_metro.config.fields import change_values, list_settings, read_value
from megatron_metro.config.schema import CheckpointConfig, RunConfig

SAVED = change_values(RunConfig(), {"hidden_size": 64, "data_path": ("30", "a"), "lr": 0.1, "kv_channels": 32})


def publish_step(folder: Path, iteration: int) -> Path:
    final = step_folder(folder, iteration)
    temporary = prepare_step(final)
    document = {"version": STATE_VERSION, "train": {"iteration": iteration}, "config": dataclasses.asdict(SAVED)}
    publish(temporary, final, document)
    return final


def test_load_wins_over_the_pretrained_checkpoint_once_it_holds_something(tmp_path: Path) -> None:
    own, pretrained = tmp_path / "own", tmp_path / "pretrained"
    publish_step(pretrained, 10)
    newest = publish_step(pretrained, 20)
    flags = CheckpointConfig(load=str(own), pretrained_checkpoint=str(pretrained), exit_on_missing_checkpoint=True)
    start = find_start(flags)
    assert (start.step, start.is_new_run, start.iteration) == (newest, True, 0)
    assert find_start(dataclasses.replace(flags, load=None)) == start
    step = publish_step(own, 3)
    start = find_start(flags)
    assert (start.step, start.is_new_run, start.iteration) == (step, False, 3)
    start = find_start(CheckpointConfig(load=str(own), finetune=True))
    assert (start.step, start.is_new_run, start.iteration) == (step, True, 0)


def test_a_step_of_a_pretrained_run_may_be_named_itself(tmp_path: Path) -> None:
    old = publish_step(tmp_path, 10)
    publish_step(tmp_path, 20)
    assert find_start(CheckpointConfig(pretrained_checkpoint=str(old))).step == old


def test_a_pretrained_checkpoint_must_exist(tmp_path: Path) -> None:
    for missing in (tmp_path / "none", tmp_path / "iter_0000007"):
        with pytest.raises(CheckpointError) as said:
            find_start(CheckpointConfig(load=str(tmp_path / "own"), pretrained_checkpoint=str(missing)))
        assert str(missing) in str(said.value) and "--load" not in str(said.value)


def test_nothing_to_start_from(tmp_path: Path) -> None:
    start = find_start(CheckpointConfig(load=str(tmp_path)))
    assert (start.step, start.is_new_run, start.iteration) == (None, True, 0)
    assert find_start(CheckpointConfig()) == start
    assert read_saved_settings(CheckpointConfig(load=str(tmp_path))) == ({}, False)
    with pytest.raises(CheckpointError, match="--load"):
        find_start(CheckpointConfig(load=str(tmp_path), exit_on_missing_checkpoint=True))


def test_saved_settings_are_those_of_the_run(tmp_path: Path) -> None:
    publish_step(tmp_path, 3)
    found, goes_on = read_saved_settings(CheckpointConfig(load=str(tmp_path)))
    assert goes_on and not read_saved_settings(CheckpointConfig(load=str(tmp_path), finetune=True))[1]
    assert found == {name: read_value(SAVED, setting) for name, setting in list_settings().items()}
    older = {"config": {"model": {"hidden_size": 64}}}
    defaults = {name: setting.default for name, setting in list_settings().items()}
    assert list_saved_settings(older) == {**defaults, "hidden_size": 64}
