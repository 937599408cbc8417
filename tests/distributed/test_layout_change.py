"""A run moves between layouts: saved in one, it goes on in another as if nothing had happened.

All pairs of sixteen layouts are in tests/full/test_layout_change_full.py.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch.distributed.checkpoint import FileSystemReader

from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.layouts import OBJECTIVE_VARIANTS, Row
from tests.helpers.resuming import (
    LAST_STEP,
    SAVED_STEP,
    Stretch,
    check_continuation,
    go_on,
    make_case,
    run_on,
    save_early,
    train,
)

Pool = Callable[[int], WorkerPool]

GATED = {**tiny.SPACTOR, **tiny.NARROW_GENERATOR, "activation": "gated-gelu"}
COCO_LM = {"model_name": "coco-lm", **OBJECTIVE_VARIANTS["coco-lm"]}
PAIRS = [
    (Row(tp=2, **COCO_LM), Row(pp=2, **COCO_LM)),
    (Row(tp=2, sp=True), Row(pp=2)),
    (Row(pp=2, vpp=2), Row(tp=2)),
    (Row(dp=2, distributed_optimizer=True), Row(pp=2, single_precision=True)),
    (Row(pp=2, vpp=2, layout="G|gg|Mee|RDddL"), Row()),
    (Row(), Row(tp=2, sp=True, pp=2)),
    (Row(pp=2, layout="Gg|gMeeRDddL"), Row(pp=2, layout="GggMeeRDd|dL")),
    (
        Row(pp=2, layout="GggMe|eRDddL", single_precision=True),
        Row(pp=2, vpp=2, layout="G|ggMee|RD|ddL", single_precision=True),
    ),
    (
        Row(tp=2, spans=True, model=tiny.T5_V1_1, model_name="T5 v1.1"),
        Row(spans=True, model=tiny.T5_V1_1, model_name="T5 v1.1"),
    ),
    (
        Row(tp=2, sp=True, pp=2, model=GATED, model_name="gated narrow generator"),
        Row(pp=2, model=GATED, model_name="gated narrow generator"),
    ),
    (
        Row(tp=2, single_precision=True, model={"activation": "gated-gelu"}),
        Row(dp=2, distributed_optimizer=True, model={"activation": "gated-gelu"}),
    ),
]


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Stretch]:
    """Whole runs on one process, computed when first needed."""
    return {}


def find_whole_run(row: Row, known: dict[str, Stretch]) -> Stretch:
    key = row.reference_key()
    if key not in known:
        whole = train(row.reference(), 0, LAST_STEP)
        assert whole is not None
        known[key] = whole
    return known[key]


DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "generator_dropout": 0.1}


@pytest.mark.parametrize(
    "row",
    [
        Row(tp=2, sp=True, model=DROPOUT),
        Row(pp=2, vpp=2, model=DROPOUT),
        Row(dp=2, model=DROPOUT, distributed_optimizer=True, overlap=True),
    ],
    ids=lambda row: row.name.partition(" hidden")[0],
)
def test_the_same_layout_goes_on_to_the_bit_with_dropout(row: Row, pool: Pool, tmp_path: Path) -> None:
    whole: Stretch = run_on(pool, row, train, 0, LAST_STEP)
    run_on(pool, row, save_early, tmp_path)
    found: Stretch = run_on(pool, row, go_on, tmp_path)
    assert (found.metrics, found.norms) == (whole.metrics[SAVED_STEP:], whole.norms[SAVED_STEP:])
    for name, weight in whole.weights.items():
        np.testing.assert_array_equal(found.weights[name], weight, err_msg=name)


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor that a step holds."""
    step = folder / f"iter_{SAVED_STEP:07d}"
    return {key: tuple(entry.size) for key, entry in FileSystemReader(step).read_metadata().state_dict_metadata.items()}


def test_checkpoints_do_not_depend_on_the_layout(pool: Pool, groups: ParallelGroups, tmp_path: Path) -> None:
    """No key names a stage, and rows that only pad the vocabulary (by 84 on one rank, by 212 on two) are not stored."""
    alone = replace(Row(), single_precision=True)
    rows = [alone, Row(pp=2, vpp=3, single_precision=True), Row(tp=2, single_precision=True)]
    rows.append(Row(dp=2, distributed_optimizer=True))
    shapes = []
    for number, row in enumerate(rows):
        run_on(pool, row, save_early, tmp_path / str(number))
        shapes.append({k: s for k, s in read_shapes(tmp_path / str(number)).items() if not k.startswith("random.")})
    assert shapes[1:] == shapes[:1] * 3
    weights = {key for key in shapes[0] if not key.startswith("optimizer.")}
    whole = train(alone.reference(), 0, 0)
    assert whole is not None
    assert weights == set(whole.weights)
    assert {f"optimizer.state.{kind}.{key}" for kind in ("exp_avg", "exp_avg_sq") for key in weights} == (
        set(shapes[0]) - weights
    )
    assert not [key for key in shapes[0] if re.search(r"stage|chunk|piece|rank|module|pipeline|pp", key)]
    assert shapes[0]["word_embeddings.weight"] == (tiny.VOCAB_SIZE, 16)
    assert shapes[0]["mlm_head.output_bias"] == (tiny.VOCAB_SIZE,)


@pytest.mark.parametrize(("saving", "loading"), PAIRS, ids=lambda row: row.name)
def test_a_run_moves_between_layouts(
    saving: Row, loading: Row, pool: Pool, groups: ParallelGroups, tmp_path: Path, uninterrupted: dict[str, Stretch]
) -> None:
    run_on(pool, saving, save_early, tmp_path)
    found: Stretch = run_on(pool, loading, go_on, tmp_path)
    check_continuation(found, find_whole_run(loading, uninterrupted), loading.tolerance)


def test_a_run_that_loses_its_moments_is_found(
    groups: ParallelGroups, tmp_path: Path, uninterrupted: dict[str, Stretch]
) -> None:
    case, expected = make_case(Row()), find_whole_run(Row(), uninterrupted)
    save_early(case, tmp_path)
    found = go_on(case, tmp_path, forget_moments=True)
    assert found is not None
    with pytest.raises(AssertionError, match="updates"):
        check_continuation(found, expected, 1e-3)
