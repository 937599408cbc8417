"""Naming, publishing, choosing and deleting steps, on files alone."""

import json
import logging

import pytest

from megatron_metro.checkpoint.folder import (
    RELEASE,
    STATE_VERSION,
    TRACKER,
    check_save_folder,
    delete_step,
    discard,
    find_step,
    list_expendable,
    list_iterations,
    prepare_step,
    publish,
    read_document,
    set_aside_damaged,
    step_folder,
)
from megatron_metro.checkpoint.manifest import MANIFEST, verify_step, write_manifest
from megatron_metro.config.errors import CheckpointError
from megatron_metro.config.schema import CheckpointConfig


def document(iteration, **more):
    return {"version": STATE_VERSION, "train": {"iteration": iteration}, **more}


def publish_step(folder, iteration):
    final = step_folder(folder, iteration)
    temporary = prepare_step(final)
    (temporary / "shard").write_text(f"bytes of {iteration}")
    publish(temporary, final, document(iteration))
    return final


def find(folder, **options):
    return find_step(CheckpointConfig(load=str(folder), **options))


def check(folder, start_iteration, **options):
    check_save_folder(CheckpointConfig(save=str(folder), **options), start_iteration)


def test_a_published_step_is_the_one_to_resume_from(tmp_path):
    publish_step(tmp_path, 10)
    newest = publish_step(tmp_path, 20)
    assert newest.name == "iter_0000020"
    assert (tmp_path / TRACKER).read_text() == "20"
    assert find(tmp_path) == newest
    assert find(tmp_path, ckpt_step=10) == tmp_path / "iter_0000010"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000010", "iter_0000020", TRACKER]
    assert read_document(newest)["train"] == {"iteration": 20}
    verify_step(newest)


def test_nothing_to_resume(tmp_path):
    assert find(tmp_path / "missing") is None
    assert find(tmp_path) is None
    assert find(tmp_path, skip_damaged_checkpoints=True) is None
    with pytest.raises(CheckpointError, match=f"holds no {TRACKER}"):
        find(tmp_path, exit_on_missing_checkpoint=True)


def test_never_from_scratch_beside_saved_steps(tmp_path):
    publish_step(tmp_path, 10)
    publish_step(tmp_path, 20)
    for text in ("", "releas", "1O", "020", "+20", " 20", "20 ", "20\n\n", "20\r\n", "-20", "2_0", "2e1", "9" * 40):
        (tmp_path / TRACKER).write_bytes(text.encode())
        with pytest.raises(CheckpointError, match=r"not a number; choose one of \[10, 20\] with --ckpt-step"):
            find(tmp_path)
    (tmp_path / TRACKER).write_bytes("\uff12\uff10".encode())  # digits to str.isdecimal
    with pytest.raises(CheckpointError, match="not a number"):
        find(tmp_path)
    (tmp_path / TRACKER).write_text("30")
    with pytest.raises(CheckpointError, match=r"iter_0000030: does not exist \(saved iterations: 10, 20\)"):
        find(tmp_path)
    (tmp_path / TRACKER).write_text(RELEASE)
    with pytest.raises(CheckpointError, match=r"release: does not exist"):
        find(tmp_path)
    (tmp_path / TRACKER).unlink()
    with pytest.raises(CheckpointError, match="missing beside iteration 20; choose one with --ckpt-step"):
        find(tmp_path)
    (tmp_path / TRACKER).mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        find(tmp_path)
    (tmp_path / "iter_0000030.x.partial").mkdir()
    (tmp_path / "iter_30").mkdir()
    (tmp_path / "iter_00000060").mkdir()
    (tmp_path / "iter_0000040.bak").mkdir()
    (tmp_path / "iter_0000050").write_text("a file")
    assert find(tmp_path, ckpt_step=10) is not None
    assert list_iterations(tmp_path) == [10, 20]


def test_a_newline_after_the_number_is_legal(tmp_path):
    newest = publish_step(tmp_path, 10)
    (tmp_path / TRACKER).write_text("10\n")
    assert find(tmp_path) == newest


def test_an_older_step_in_the_tracker_is_refused_unless_a_crash_explains_it(tmp_path):
    for iteration in (10, 20, 30):
        newest = publish_step(tmp_path, iteration)
    (tmp_path / TRACKER).write_text("20")  # killed just before the tracker was replaced
    assert find(tmp_path) == newest
    (tmp_path / TRACKER).write_text("10")
    with pytest.raises(CheckpointError, match="names 10 beside iteration 30; choose one with --ckpt-step"):
        find(tmp_path)
    assert find(tmp_path, ckpt_step=20) == tmp_path / "iter_0000020"


def test_a_crash_before_the_first_tracker(tmp_path):
    newest = publish_step(tmp_path, 10)
    (tmp_path / TRACKER).unlink()
    assert find(tmp_path) == newest


def test_released_weights(tmp_path):
    release = tmp_path / RELEASE
    release.mkdir()
    write_manifest(release, document(0))
    with pytest.raises(CheckpointError, match="missing beside release; write that word into it"):
        find(tmp_path)
    (tmp_path / TRACKER).write_text(RELEASE)
    assert find(tmp_path) == release
    newest = publish_step(tmp_path, 10)
    assert find(tmp_path) == newest
    (tmp_path / TRACKER).write_text(RELEASE)  # killed just before the tracker was replaced
    assert find(tmp_path) == newest
    (tmp_path / TRACKER).write_text("10")
    publish_step(tmp_path, 20)
    (tmp_path / TRACKER).write_text(RELEASE)
    with pytest.raises(CheckpointError, match="names release beside iteration 20"):
        find(tmp_path)


def test_a_step_is_never_overwritten(tmp_path):
    final = publish_step(tmp_path, 10)
    with pytest.raises(CheckpointError, match="exists already and is never overwritten"):
        prepare_step(final)


def test_leftovers_are_cleared_by_the_next_save_and_nothing_else(tmp_path):
    first = publish_step(tmp_path, 10)
    kept = [tmp_path / name for name in ("iter_0000020.partial.bak", "partial", "iter_0000005.x.damaged")]
    gone = [tmp_path / name for name in ("iter_0000020.abc.partial", "iter_0000005.deleted")]
    for folder in (*kept, *gone):
        (folder / "inside").mkdir(parents=True)
    (tmp_path / f".{TRACKER}.xyz.tmp").write_text("1")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "iter_0000007.deleted").symlink_to(outside)
    publish_step(tmp_path, 20)
    names = {"iter_0000010", "iter_0000020", "outside", TRACKER} | {folder.name for folder in kept}
    assert {path.name for path in tmp_path.iterdir()} == names
    verify_step(first)


def test_discarding_what_is_gone(tmp_path):
    discard(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_would_meet_existing_steps_does_not_start(tmp_path):
    check(tmp_path, 0)
    publish_step(tmp_path, 10)
    check(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"holds iteration 10, but this run starts at 0.*--ckpt-step 10"):
        check(tmp_path, 0)


def test_damaged_steps_are_passed_over_only_on_demand(tmp_path, caplog):
    for iteration in (10, 20, 30):
        publish_step(tmp_path, iteration)
    (tmp_path / "iter_0000030" / "shard").write_text("bytes of 3x")
    (tmp_path / "iter_0000020" / MANIFEST).write_text("{")
    options = {"load": str(tmp_path), "save": str(tmp_path), "skip_damaged_checkpoints": True}
    with pytest.raises(CheckpointError, match=r"iter_0000030/shard: is damaged"):
        verify_step(find(tmp_path))
    with pytest.raises(CheckpointError, match=r"iter_0000020/manifest.json: is damaged"):
        find(tmp_path, ckpt_step=20, skip_damaged_checkpoints=True)
    with caplog.at_level(logging.WARNING):
        assert find_step(CheckpointConfig(**options)) == tmp_path / "iter_0000010"
    assert [("iter_0000030/shard" in text, "iter_0000020/manifest" in text) for text in caplog.messages] == [
        (True, False),
        (False, True),
    ]
    check_save_folder(CheckpointConfig(**options), 10)
    set_aside_damaged(CheckpointConfig(**options), 10)
    assert list_iterations(tmp_path) == [10]
    assert len(list(tmp_path.glob("iter_*.damaged"))) == 2
    assert find(tmp_path) == tmp_path / "iter_0000010"
    publish_step(tmp_path, 20)
    (tmp_path / "iter_0000010" / "shard").unlink()
    (tmp_path / "iter_0000020" / "shard").unlink()
    with pytest.raises(CheckpointError, match="no step of it is whole"):
        find(tmp_path, skip_damaged_checkpoints=True)


def test_steps_are_set_aside_only_where_they_were_chosen_from(tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    for iteration in (10, 20):
        publish_step(folder, iteration)
    publish_step(other, 10)
    here = {"save": str(folder), "skip_damaged_checkpoints": True}
    for options in (
        {"load": str(other)},
        {"load": str(folder), "ckpt_step": 10},
        {"load": str(folder), "finetune": True},
        {"load": str(folder), "skip_damaged_checkpoints": False},
        {},
    ):
        checkpoint = CheckpointConfig(**{**here, **options})
        set_aside_damaged(checkpoint, 10)
        with pytest.raises(CheckpointError, match="holds iteration 20"):
            check_save_folder(checkpoint, 10)
    assert list_iterations(folder) == [10, 20]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [10, 20, 30, 40, 50]),
        ({"keep_last": 1}, [50]),
        ({"keep_last": 3}, [30, 40, 50]),
        ({"keep_last": 9}, [10, 20, 30, 40, 50]),
        ({"save_retain_interval": 20}, [20, 40, 50]),
        ({"save_retain_interval": 20, "keep_last": 2}, [20, 40, 50]),
        ({"save_retain_interval": 40, "keep_last": 3}, [30, 40, 50]),
        ({"save_retain_interval": 1000}, [50]),
    ],
)
def test_which_steps_are_retained(tmp_path, options, kept):
    for iteration in (10, 20, 30, 40, 50, 60):
        publish_step(tmp_path, iteration)
    for step in list_expendable(CheckpointConfig(save=str(tmp_path), **options), 50):
        delete_step(step)
    assert list_iterations(tmp_path) == [*kept, 60]
    assert len(list(tmp_path.iterdir())) == len(kept) + 2


def test_ten_thousand_steps_are_found_at_once(tmp_path):
    for iteration in range(10_000):
        step_folder(tmp_path, iteration).mkdir()
    assert list_iterations(tmp_path) == list(range(10_000))


@pytest.mark.parametrize("content", [{}, {"version": STATE_VERSION + 1, "train": {"iteration": 1}}, {"version": 1}])
def test_a_foreign_state_is_refused(tmp_path, content):
    write_manifest(tmp_path, content)
    with pytest.raises(CheckpointError, match=r"not the state of a run|use the one that saved it") as refusal:
        read_document(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_renamed_step_is_refused(tmp_path):
    publish_step(tmp_path, 10).rename(tmp_path / "iter_0000020")
    with pytest.raises(CheckpointError, match="iter_0000020: holds iteration 10; give the folder its own name again"):
        read_document(tmp_path / "iter_0000020")


def test_the_tracker_and_the_state_agree(tmp_path):
    step = publish_step(tmp_path, 10)
    assert json.loads((step / MANIFEST).read_text())["previous"] is None
    assert json.loads((publish_step(tmp_path, 20) / MANIFEST).read_text())["previous"] == "10"


def test_every_byte_of_the_tracker_counts(tmp_path):
    for iteration in (10, 20):
        publish_step(tmp_path, iteration)
    newest = publish_step(tmp_path, 30)
    whole = (tmp_path / TRACKER).read_bytes()
    accepted = {}
    for position in range(len(whole)):
        for byte in set(range(256)) - {whole[position]}:
            changed = whole[:position] + bytes([byte]) + whole[position + 1 :]
            (tmp_path / TRACKER).write_bytes(changed)
            try:
                accepted[changed] = find(tmp_path)
            except CheckpointError as error:
                assert TRACKER in str(error) or "does not exist" in str(error)
    # 20 is what a crash between the two renames leaves, and leads to the same step.
    assert accepted == {b"20": newest}
