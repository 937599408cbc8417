"""Every layout writes and scores what one process does: greedy, sampled and by beams, T5 and METRO."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_metro.config.schema import ParallelConfig
from megatron_metro.inference.options import WritingOptions
from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.generation import (
    METRO_IDS,
    T5_IDS,
    Texts,
    assert_equal,
    build_model,
    score_all,
    score_on_worker,
    with_end,
    write_all,
    write_on_worker,
)

Pool = Callable[[int], WorkerPool]
LAYOUTS = [(2, 1), (1, 2), (1, 3), (2, 2)]
MODELS = {"t5": (tiny.T5_V1_1, T5_IDS), "metro": ({}, METRO_IDS)}
DECODINGS = [
    WritingOptions(max_new_tokens=10),
    WritingOptions(decoding="sample", max_new_tokens=10, temperature=1.2),
    WritingOptions(decoding="sample", max_new_tokens=10, top_k=40, top_p=0.9),
    WritingOptions(decoding="sample", max_new_tokens=10, top_p=0.8),
    WritingOptions(decoding="beam", max_new_tokens=8, num_beams=3),
]


def cut(tp: int, pp: int) -> ParallelConfig:
    return ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS, ids=[f"tp{tp} pp{pp}" for tp, pp in LAYOUTS])
def test_every_layout_writes_the_same(tp: int, pp: int, groups: ParallelGroups, pool: Pool) -> None:
    cases, expected = [], []
    for model, ids in MODELS.values():
        texts = Texts(model=model, options=DECODINGS[0], ids=ids)
        built = build_model(texts, groups)
        texts = with_end(texts, built)
        cases += [replace(texts, options=options) for options in DECODINGS]
        expected += [write_all(case, built) for case in cases[-len(DECODINGS) :]]
    # Other batches than those of the one process, too.
    found = pool(tp * pp).run(write_on_worker, [replace(case, parallel=cut(tp, pp), batch_size=7) for case in cases])
    for answers in found:  # every rank knows every text
        for texts, wanted in zip(answers, expected, strict=True):
            assert_equal(texts, wanted, tolerance=1e-9)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (2, 2)], ids=["tp2 pp1", "tp2 pp2"])
def test_every_layout_scores_the_same(tp: int, pp: int, groups: ParallelGroups, pool: Pool) -> None:
    for model, ids in MODELS.values():
        texts = Texts(model=model, options=DECODINGS[0], ids=ids)
        expected = score_all(texts, build_model(texts, groups))
        for found in pool(tp * pp).run(score_on_worker, replace(texts, parallel=cut(tp, pp), batch_size=7)):
            for a, b in zip(found, expected, strict=True):
                assert a == pytest.approx(b, abs=1e-9)
