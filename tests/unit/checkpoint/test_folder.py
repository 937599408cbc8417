"""Naming, publishing and choosing steps, on files alone."""

import json

import pytest

from megatron_metro.checkpoint.folder import (
    STATE_VERSION,
    TRACKER,
    check_save_folder,
    find_step,
    prepare_step,
    publish,
    read_document,
    step_folder,
)
from megatron_metro.config.errors import CheckpointError
from megatron_metro.config.schema import CheckpointConfig


def publish_step(folder, iteration):
    final = step_folder(folder, iteration)
    temporary = final.with_name(f"{final.name}.partial")
    prepare_step(final, temporary)
    (temporary / "shard").write_text("bytes")
    publish(temporary, final, {"version": STATE_VERSION, "train": {"iteration": iteration}})
    return final


def find(folder, **options):
    return find_step(CheckpointConfig(load=str(folder), **options))


def test_a_published_step_is_the_one_to_resume_from(tmp_path):
    publish_step(tmp_path, 10)
    newest = publish_step(tmp_path, 20)
    assert newest.name == "iter_0000020"
    assert (tmp_path / TRACKER).read_text() == "20"
    assert find(tmp_path) == newest
    assert find(tmp_path, ckpt_step=10) == tmp_path / "iter_0000010"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000010", "iter_0000020", TRACKER]
    assert read_document(newest)["train"] == {"iteration": 20}


def test_nothing_to_resume(tmp_path):
    assert find(tmp_path / "missing") is None
    assert find(tmp_path) is None
    with pytest.raises(CheckpointError, match=f"holds no {TRACKER}"):
        find(tmp_path, exit_on_missing_checkpoint=True)


def test_never_from_scratch_beside_saved_steps(tmp_path):
    publish_step(tmp_path, 10)
    for text in ("", "release", "1O"):
        (tmp_path / TRACKER).write_text(text)
        with pytest.raises(CheckpointError, match=r"not a number; choose one of \[10\] with --ckpt-step"):
            find(tmp_path)
    (tmp_path / TRACKER).write_text("30")
    with pytest.raises(CheckpointError, match=r"iter_0000030: does not exist \(saved iterations: 10\)"):
        find(tmp_path)
    (tmp_path / TRACKER).unlink()
    with pytest.raises(CheckpointError, match="missing beside iteration 10"):
        find(tmp_path)
    (tmp_path / "iter_0000020.partial").mkdir()
    assert find(tmp_path, ckpt_step=10) is not None


def test_a_step_is_never_overwritten(tmp_path):
    final = publish_step(tmp_path, 10)
    with pytest.raises(CheckpointError, match="exists already and is never overwritten"):
        prepare_step(final, tmp_path / "temporary")


def test_a_run_that_would_meet_existing_steps_does_not_start(tmp_path):
    check_save_folder(str(tmp_path), 0)
    publish_step(tmp_path, 10)
    check_save_folder(str(tmp_path), 10)
    with pytest.raises(CheckpointError, match="holds iteration 10, but this run starts at 0"):
        check_save_folder(str(tmp_path), 0)


def test_the_advice_helps_after_a_crash_just_before_the_tracker(tmp_path):
    publish_step(tmp_path, 10)
    newest = publish_step(tmp_path, 20)
    (tmp_path / TRACKER).write_text("10")
    with pytest.raises(CheckpointError, match=f"holds iteration 20, .*--load {tmp_path} --ckpt-step 20") as refusal:
        check_save_folder(str(tmp_path), read_document(find(tmp_path))["train"]["iteration"])
    advised = int(str(refusal.value).split("--ckpt-step ")[1].split(")")[0])
    assert find(tmp_path, ckpt_step=advised) == newest
    check_save_folder(str(tmp_path), advised)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"version": STATE_VERSION + 1})])
def test_a_foreign_state_file_is_refused(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError) as refusal:
        read_document(tmp_path)
    assert "\n" not in str(refusal.value)
