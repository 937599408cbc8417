"""200 prompts of mixed length: every layout, batch size and padding against transformers' T5 and BART, and METRO."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_metro.config.schema import ParallelConfig
from megatron_metro.inference.options import WritingIds, WritingOptions
from megatron_metro.inference.pipeline import Written
from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.generation import (
    METRO_IDS,
    T5_IDS,
    Texts,
    assert_equal,
    build_bart,
    build_model,
    build_t5,
    restate,
    with_end,
    write_all,
    write_on_worker,
    write_with_transformers,
)

pytestmark = pytest.mark.full

Pool = Callable[[int], WorkerPool]
NUM_PROMPTS = 200
UNEQUAL: dict[str, Any] = {"encoder_num_layers": 3, "decoder_num_layers": 2, "kv_channels": 5}
MODELS: dict[str, tuple[dict[str, Any], WritingIds, bool]] = {
    "T5 v1.0": (tiny.T5_V1_0, T5_IDS, False),
    "T5 v1.1": (tiny.T5_V1_1, T5_IDS, False),
    "T5 v1.1 unequal depth, odd d_kv": ({**tiny.T5_V1_1, **UNEQUAL}, T5_IDS, False),
    "BART": ({}, METRO_IDS, True),
    "METRO": ({}, METRO_IDS, False),
}
DECODINGS = {
    "greedy": WritingOptions(max_new_tokens=16),
    "beam": WritingOptions(
        decoding="beam", num_beams=4, max_new_tokens=12, length_penalty_form="hf", length_penalty=1.0
    ),
}
LAYOUTS = [(2, 1), (1, 2), (2, 2)]


def write_with_others(texts: Texts, groups: ParallelGroups) -> list[Written]:
    """By transformers or, where METRO has a bias, by its formulas."""
    model = build_model(texts, groups)
    if texts.model:
        return write_with_transformers(texts, build_t5(model))
    return write_with_transformers(texts, build_bart(model)) if texts.zero_bias else restate(texts, model)


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("name", MODELS)
def test_200_prompts(
    name: str, decoding: str, groups: ParallelGroups, pool: Pool, record_property: Callable[[str, object], None]
) -> None:
    model, ids, zero_bias = MODELS[name]
    options = DECODINGS[decoding]
    if name == "METRO" and decoding == "beam":  # its formulas are searched in T5's form
        options = WritingOptions(decoding="beam", num_beams=2, max_new_tokens=8)
    texts = Texts(model=model, options=options, ids=ids, zero_bias=zero_bias, num_prompts=NUM_PROMPTS)
    texts = with_end(texts, build_model(texts, groups))
    expected = write_with_others(texts, groups)
    for batch_size in (1, 8, 200):
        assert_equal(write_all(replace(texts, batch_size=batch_size), build_model(texts, groups)), expected)
    for tp, pp in LAYOUTS:
        parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        cases = [replace(texts, parallel=parallel, batch_size=32)]
        for [found] in pool(tp * pp).run(write_on_worker, cases, timeout=1800.0):
            assert_equal(found, expected)
    record_property(f"{name}, {decoding}: prompts equal token for token in 6 batchings and layouts", NUM_PROMPTS)
    record_property(f"{name}, {decoding}: different texts", len({text.ids for text in expected}))
