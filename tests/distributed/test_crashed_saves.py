"""Real saves of two ranks that end anywhere: killed, without a writer, on a full disk. What was saved stays whole."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_metro.checkpoint.folder import TRACKER, list_iterations, step_folder
from megatron_metro.checkpoint.lock import LOCK
from megatron_metro.checkpoint.manifest import verify_step
from tests.helpers.crash_server import CrashServer, RankEnd

SCENARIOS = ("fresh", "leftover", "rollback")


@pytest.fixture(scope="module")
def server() -> Iterator[CrashServer]:
    with CrashServer() as server:
        yield server


@pytest.fixture(scope="module")
def saved(server: CrashServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    for start, end in ((0, 2), (2, 4)):
        ends = server.run(folder=str(folder), start=start, end=end)
        assert [rank.code for rank in ends] == [0, 0], ends
    return folder


def prepare(scenario: str, saved: Path, folder: Path) -> tuple[int, int]:
    """The folder of a scenario; the step to start from and the one to save."""
    if scenario == "fresh":
        folder.mkdir()
        return 0, 2
    shutil.copytree(saved, folder)
    if scenario == "rollback":
        return 2, 4
    shutil.copytree(folder / "iter_0000002", folder / "iter_0000006.abc.partial")
    shutil.copytree(folder / "iter_0000002", folder / "iter_0000000.deleted")
    return 4, 6


def read_steps(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("iter_???????/*"))}


def check_after(server: CrashServer, folder: Path, before: dict[str, bytes], ends: list[RankEnd], end: int) -> None:
    """What was there is there to the byte; all steps are whole; the newest one loads, at another layout, unmixed."""
    after = read_steps(folder)
    assert {name: after.get(name) for name in before} == before
    iterations = list_iterations(folder)
    for iteration in iterations:
        verify_step(step_folder(folder, iteration))
    is_announced = any(rank.iteration == end and rank.error is None for rank in ends)
    assert end in iterations or not is_announced, "announced and lost"
    loaded = server.run(folder=str(folder), layout="tensor")
    assert [rank.error for rank in loaded] == [None, None]
    assert [rank.iteration for rank in loaded] == [max(iterations, default=None)] * 2


def kill_points(
    server: CrashServer, saved: Path, tmp_path: Path, scenario: str, **options
) -> Iterator[tuple[int, int]]:
    """(rank, operation) of a whole save of the scenario."""
    folder = tmp_path / "counted"
    start, end = prepare(scenario, saved, folder)
    ends = server.run(folder=str(folder), start=start, end=end, **options)
    for rank, found in enumerate(ends):
        yield from ((rank, index) for index in range(found.num_operations))


def assert_kill_survived(
    server: CrashServer, saved: Path, folder: Path, scenario: str, rank: int, index: int, **options
) -> None:
    start, end = prepare(scenario, saved, folder)
    before = read_steps(folder)
    ends = server.run(folder=str(folder), start=start, end=end, kill_rank=rank, kill_at=index, **options)
    if scenario == "rollback":
        assert all("exists already" in str(found.error) for found in ends), ends
    else:
        assert ends[rank].code == -signal.SIGKILL, ends
        assert ends[1 - rank].code != 0 or ends[1 - rank].iteration == end, ends
    check_after(server, folder, before, ends, end)
    shutil.rmtree(folder)


def test_kills_of_a_real_save(server, saved, tmp_path):
    points = list(kill_points(server, saved, tmp_path / "counted", "leftover"))
    assert len(points) >= 20 and {rank for rank, _ in points} == {0, 1}
    for number, (rank, index) in enumerate([*points[4:-2:9], points[-2], points[-1]]):
        assert_kill_survived(server, saved, tmp_path / "run", "leftover", rank, index, kills_group=number % 2 == 0)
    assert_kill_survived(server, saved, tmp_path / "run", "rollback", 0, 0)
    assert_kill_survived(server, saved, tmp_path / "run", "fresh", 0, 12)


@pytest.mark.full
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("layout", ["data", "distributed", "tensor", "pipeline"])
def test_every_kill_of_a_real_save(server, saved, tmp_path, record_property, layout, is_async):
    num_points = 0
    for scenario in SCENARIOS:
        options = {"layout": layout, "is_async": is_async}
        for rank, index in kill_points(server, saved, tmp_path / scenario, scenario, **options):
            kills_group = (rank + index) % 2 == 0
            assert_kill_survived(
                server, saved, tmp_path / "run", scenario, rank, index, kills_group=kills_group, **options
            )
            num_points += 1
    assert num_points >= 38, "eight kinds of saves make three hundred points"
    record_property(f"kill points of a real save, {layout}, {'async' if is_async else 'sync'}", num_points)


def check_refused(saved: Path, folder: Path, before: dict[str, bytes], ends: list[RankEnd], words: str) -> None:
    """Exit code 74 on every rank, with the same line; nothing is lost or left."""
    assert [rank.code for rank in ends] == [74, 74], ends
    assert ends[0].error == ends[1].error and words in str(ends[0].error), ends
    assert "earlier steps are intact" in str(ends[0].error)
    assert read_steps(folder) == before
    assert {path.name for path in folder.iterdir()} - {LOCK} == {path.name for path in saved.iterdir()} - {LOCK}


@pytest.mark.parametrize(("rank", "index"), [(0, 0), (1, 1)])
def test_a_killed_writer_is_noticed_on_all_ranks(server, saved, tmp_path, rank, index):
    assert kill_a_writer(server, saved, tmp_path / "run", rank, index) < 10


def kill_a_writer(server: CrashServer, saved: Path, folder: Path, rank: int, index: int) -> float:
    """Kill a rank's writer before its first operation (0: opening) or second one (1: fsync); seconds until noticed."""
    shutil.copytree(saved, folder)
    before = read_steps(folder)
    options = {"is_async": True, "kill_rank": rank, "kill_at": index, "kills_writer": True}
    ends = server.run(folder=str(folder), start=4, end=6, **options)
    check_refused(saved, folder, before, ends, f"rank {rank}: ")
    assert "was killed by signal 9" in str(ends[0].error)
    shutil.rmtree(folder)
    return max(end.seconds for end in ends)


@pytest.mark.full
def test_killed_writers_are_noticed(server, saved, tmp_path, record_property):
    kinds = [(rank, index) for rank in range(2) for index in range(2)] * 8
    seconds = [kill_a_writer(server, saved, tmp_path / "run", rank, index) for rank, index in kinds]
    assert max(seconds) < 10
    record_property("killed writers", len(seconds))
    record_property("seconds until noticed on all ranks, at most", round(max(seconds), 2))


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_disk_that_fills_up(server, tmp_path, is_async):
    assert_full_disk_refused(server, tmp_path, 0.6, is_async=is_async)


def assert_full_disk_refused(server: CrashServer, tmp_path: Path, share: float, *, is_async: bool) -> None:
    """A file system with room for a share of the step; nothing was saved before, nothing is left."""
    whole, small = tmp_path / "whole", tmp_path / "small"
    for folder in (whole, small):
        folder.mkdir()
    assert [rank.code for rank in server.run(folder=str(whole), start=0, end=2)] == [0, 0]
    page = 4096
    needed = sum(-(-path.stat().st_size // page) * page for path in whole.rglob("*") if path.is_file())
    size = int(share * needed) // page * page
    ends = server.run(folder=str(small), start=0, end=2, is_async=is_async, disk_bytes=size)
    assert [rank.code for rank in ends] == [74, 74], ends
    assert ends[0].error == ends[1].error and "No space left on device" in str(ends[0].error)
    assert "MB needed, " in str(ends[0].error) and "MB free" in str(ends[0].error)
    assert ends[0].files == {}


@pytest.mark.full
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.8, 0.99])
def test_disks_that_fill_up(server, tmp_path, record_property, share, is_async):
    assert_full_disk_refused(server, tmp_path, share, is_async=is_async)
    record_property(f"disk full at {share:.0%} of a save", "refused")


def test_what_is_left_after_all_that(server, saved):
    names = {path.name for path in saved.iterdir()} - {LOCK}
    assert names == {"iter_0000002", "iter_0000004", TRACKER}
