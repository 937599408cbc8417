"""A save may end anywhere, by a kill or a loss of power: no announced step is lost, none is mixed."""

import random
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from megatron_metro.checkpoint.folder import TRACKER, find_step
from megatron_metro.checkpoint.manifest import verify_step
from megatron_metro.config.schema import CheckpointConfig
from tests.helpers.crashing import Model, Save, SaveServer, record_saves
from tests.helpers.power_loss import Disk, Operation, build_tree


@pytest.fixture(scope="module")
def saver() -> Iterator[SaveServer]:
    with SaveServer() as started:
        yield started


def fresh(folder: Path) -> tuple[list[Save], Save]:
    return [], Save(10, 1)


def leftover(folder: Path) -> tuple[list[Save], Save]:
    for name in ("iter_0000020.abc.partial", "iter_0000010.deleted", f".{TRACKER}.xyz.tmp"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__0_0.distcp").write_bytes(b"of another attempt")
    shutil.rmtree(folder / f".{TRACKER}.xyz.tmp")
    (folder / f".{TRACKER}.xyz.tmp").write_bytes(b"1")
    return [Save(10, 1)], Save(20, 2)


def rollback(folder: Path) -> tuple[list[Save], Save]:
    return [Save(10, 1), Save(20, 2), Save(30, 3)], Save(20, 4)


def rotation(folder: Path) -> tuple[list[Save], Save]:
    return [Save(10, 1), Save(20, 2), Save(30, 3)], Save(40, 4, keep_last=2, save_retain_interval=20)


@pytest.mark.parametrize("scenario", [fresh, leftover, rollback, rotation])
def test_a_kill_before_every_operation_of_a_save(saver, tmp_path, scenario):
    num_killed = 0
    for index in count():
        folder = tmp_path / f"{index}"
        folder.mkdir()
        earlier, save = scenario(folder)
        model = Model(folder, saver)
        for other in earlier:
            assert not model.save_killed_at(other, -1)
        was_killed = model.save_killed_at(save, index)
        model.check()
        if not was_killed:
            break
        num_killed += 1
        model.save_whole(Save(50, 5))
        shutil.rmtree(folder)
    assert num_killed >= (0 if scenario is rollback else 20)
    if scenario is rotation:
        assert set(model.announced) == {20, 30, 40}


def run_random_kills(saver: SaveServer, tmp_path: Path, num_points: int, seed: int) -> int:
    """Saves into folders that live through many kills, each before a random operation; the number of kills."""
    generator, num_killed, attempt = random.Random(seed), 0, 0
    while num_killed < num_points:
        folder = tmp_path / f"{attempt}"
        folder.mkdir()
        model = Model(folder, saver)
        for _ in range(generator.randrange(1, 25)):
            attempt += 1
            newest = max(model.announced, default=0)
            can_roll_back = model.announced and generator.random() < 0.2
            save = Save(
                generator.choice(sorted(model.announced)) if can_roll_back else newest + 10,
                attempt,
                num_shards=generator.randrange(1, 5),
                keep_last=generator.choice([None, None, 1, 2, 3]),
                save_retain_interval=generator.choice([None, None, 20, 50]),
            )
            num_killed += model.save_killed_at(save, generator.randrange(50))
            model.check()
        model.save_whole(Save(max(model.announced, default=0) + 10, attempt + 1))
        attempt += 1
        shutil.rmtree(folder)
    return num_killed


def test_kills_at_random(saver, tmp_path):
    assert run_random_kills(saver, tmp_path, 100, seed=1) >= 100


@pytest.mark.full
def test_ten_thousand_kills_at_random(saver, tmp_path, record_property):
    record_property(
        "kill points of the publish protocol, 0 announced steps lost, 0 mixed",
        run_random_kills(saver, tmp_path, 10_000, seed=2),
    )


def check_power_loss(saver: SaveServer, tmp_path: Path, saves: list[Save], share_of_states: float, seed: int) -> int:
    """Recover from states that the disk may be in after any operation of these saves; the number of states."""
    folder = tmp_path / "recorded"
    folder.mkdir()
    operations = record_saves(saves, folder, tmp_path / "trace")
    assert sum(operation.name == "announce" for operation in operations) == len(saves)
    generator, disk, announced, num_states = random.Random(seed), Disk(), 0, 0
    by_iteration = {save.iteration: save for save in saves}
    for index, operation in enumerate(operations):
        if operation.name == "announce":
            announced = int(operation.paths[0])
        disk.replay(operation)
        disk.learn_contents(operations[index + 1 :])
        for tree in disk.crash_states(generator, num_random=30):
            if generator.random() > share_of_states:
                continue
            num_states += 1
            state = tmp_path / "state"
            build_tree(tree, state)
            recover(saver, state, announced, by_iteration)
            shutil.rmtree(state)
    return num_states


def recover(saver: SaveServer, folder: Path, announced: int, saves: dict[int, Save]) -> None:
    chosen = find_step(CheckpointConfig(load=str(folder)))
    if chosen is None:
        assert announced == 0, f"iteration {announced} is lost"
        return
    verify_step(chosen)
    iteration = int(chosen.name.removeprefix("iter_"))
    assert iteration >= announced, f"iteration {announced} is lost"
    for name, content in saves[iteration].contents().items():
        assert (chosen / name).read_bytes() == content, name
    model = Model(folder, saver, {iteration: saves[iteration]}, list(saves.values()))
    model.check()


THREE_SAVES = [Save(10, 1), Save(20, 2, keep_last=1), Save(30, 3, keep_last=1)]


def test_states_after_a_loss_of_power(saver, tmp_path):
    assert check_power_loss(saver, tmp_path, THREE_SAVES, 0.1, seed=1) >= 100


@pytest.mark.full
def test_all_states_after_a_loss_of_power(saver, tmp_path, record_property):
    record_property(
        "states after a loss of power, all recovered", check_power_loss(saver, tmp_path, THREE_SAVES, 1.0, seed=2)
    )


def test_the_model_of_a_disk_drops_what_was_not_synchronised(tmp_path):
    disk = Disk()
    for operation in (
        Operation(name="mkdir", paths=("a",)),
        Operation(name="open", paths=("a/x",)),
        Operation(name="fsync", paths=("a/x",), content=b"1234"),
        Operation(name="rename", paths=("a", "b")),
    ):
        disk.replay(operation)
    states = list(disk.crash_states(random.Random(1), 0))
    assert {} in states and {"a": None} in states and {"b": None, "b/x": b"1234"} in states and {"b": None} in states
    disk.replay(Operation(name="fsync", paths=(".",)))
    assert all(state in ({"b": None}, {"b": None, "b/x": b"1234"}) for state in disk.crash_states(random.Random(1), 0))
    disk.replay(Operation(name="fsync", paths=("b",)))
    assert all(state == {"b": None, "b/x": b"1234"} for state in disk.crash_states(random.Random(1), 0))
