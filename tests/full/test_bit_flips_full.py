"""Damage of every kind to real checkpoints: all of it is refused."""

import random
import shutil
from pathlib import Path

import pytest

from megatron_metro.checkpoint.folder import TRACKER, find_step
from megatron_metro.checkpoint.manifest import MANIFEST, verify_step
from megatron_metro.config.errors import CheckpointError
from megatron_metro.config.schema import CheckpointConfig
from tests.distributed.test_checkpoint import DP2_DISTRIBUTED, FP32, Run

NUM_FLIPS = 3000  # in every file


def save_two_steps(folder: str) -> None:
    run = Run(DP2_DISTRIBUTED, FP32, CheckpointConfig(save=folder))
    for step in (10, 30):
        run.advance(step)
        run.save()


@pytest.fixture
def saved(pool, tmp_path) -> Path:
    pool(2).run(save_two_steps, str(tmp_path / "run"))
    return tmp_path / "run"


def is_refused(folder: Path) -> bool:
    try:
        step = find_step(CheckpointConfig(load=str(folder)))
        assert step is not None, "from scratch beside saved steps"
        verify_step(step)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return True
    return False


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


@pytest.mark.full
def test_flipped_bits_in_every_file(saved, record_property):
    assert not is_refused(saved)
    step, generator, num_flips = saved / "iter_0000030", random.Random(1), 0
    for path in sorted(step.iterdir()):
        size = path.stat().st_size
        for _ in range(NUM_FLIPS):
            position, bit = generator.randrange(size), generator.randrange(8)
            flip(path, position, bit)
            assert is_refused(saved), (path.name, position, bit)
            flip(path, position, bit)
            num_flips += 1
    assert not is_refused(saved)
    record_property("random bit flips in the files of a step, all refused", num_flips)


@pytest.mark.full
def test_every_bit_of_manifest_and_tracker(saved, record_property):
    num_flips = 0
    for path in (saved / "iter_0000030" / MANIFEST, saved / TRACKER):
        for position in range(path.stat().st_size):
            for bit in range(8):
                flip(path, position, bit)
                # 10 for 30 is what a crash just before the tracker leaves; it leads to the same step.
                assert is_refused(saved) or path.read_bytes() == b"10", (path.name, position, bit)
                flip(path, position, bit)
                num_flips += 1
    assert not is_refused(saved)
    record_property("bit flips of manifest and tracker, all refused but one that leads to the same step", num_flips)


@pytest.mark.full
def test_lost_cut_doubled_and_swapped_files(saved, tmp_path, record_property):
    num_faults = 0
    names = sorted(path.name for path in (saved / "iter_0000030").iterdir())
    for name in names:
        for fault in ("lose", "cut", "lengthen", "empty", "older", "swap"):
            folder = tmp_path / "copy"
            shutil.copytree(saved, folder)
            path = folder / "iter_0000030" / name
            older, content = folder / "iter_0000010" / name, path.read_bytes()
            other = path.with_name(names[(names.index(name) + 1) % len(names)])
            if fault == "lose":
                path.unlink()
            elif fault == "swap":
                path.write_bytes(other.read_bytes())
                other.write_bytes(content)
            else:
                changed = {"cut": content[:-1], "lengthen": content + b"\0", "empty": b"", "older": older.read_bytes()}
                path.write_bytes(changed[fault])
            is_changed = path.exists() and path.read_bytes() == content
            assert is_refused(folder) or is_changed, (name, fault)
            num_faults += not is_changed
            shutil.rmtree(folder)
    record_property("lost, cut, lengthened, emptied, older and swapped files, all refused", num_faults)
