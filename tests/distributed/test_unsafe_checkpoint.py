"""What one rank refuses to read, all refuse: the same error everywhere, and nobody waits for it."""

from pathlib import Path

from megatron_metro.config.errors import MetroError
from megatron_metro.config.schema import ParallelConfig
from megatron_metro.parallel.groups import reinitialise
from tests.helpers import hostile, stored_run

TP2 = ParallelConfig(tensor_model_parallel_size=2)


def save(folder: str) -> None:
    groups = reinitialise(TP2)
    stored_run.save_run(Path(folder), groups, stored_run.at_layout(TP2), noise=False)


def load(folder: str) -> tuple[int, str]:
    stored = stored_run.build_run(Path(folder), reinitialise(TP2), stored_run.at_layout(TP2))
    try:
        stored.load(Path(folder))
    except MetroError as error:
        return error.exit_code, str(error)
    return 0, ""


def test_all_ranks_refuse_what_one_cannot_read(pool, tmp_path):
    folder, canary = tmp_path / "run", tmp_path / "canary"
    pool(2).run(save, str(folder))
    assert pool(2).run(load, str(folder)) == [(0, "")] * 2
    step = folder / stored_run.STEP
    shard, index = step / "__1_0.distcp", step / ".metadata"
    whole = shard.read_bytes()
    shard.write_bytes(bytes(len(whole)))
    stored_run.sign(step)
    first, second = pool(2).run(load, str(folder))
    assert first == second and first[0] == 66 and "__1_0.distcp" in first[1]
    shard.write_bytes(whole)
    content, words = hostile.payloads(f"touch {canary}")["protocol 4"]
    index.write_bytes(content)
    stored_run.sign(step)
    first, second = pool(2).run(load, str(folder))
    assert first == second and first[0] == 77 and words in first[1]
    assert not canary.exists()
