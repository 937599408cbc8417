"""Texts of one process against transformers' T5 and BART and against a restatement that recomputes every prefix."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_metro.inference import beams, writing
from megatron_metro.inference.options import WritingIds, WritingOptions
from megatron_metro.inference.pipeline import EncoderDecoder, pad_sources
from megatron_metro.inference.writing import write
from megatron_metro.model.network import PositionEmbeddings
from megatron_metro.model.past import OwnPast
from megatron_metro.model.relative_bias import RelativeBias
from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers import tiny
from tests.helpers.generation import (
    METRO_IDS,
    T5_IDS,
    Texts,
    assert_equal,
    build_bart,
    build_model,
    build_t5,
    draw_prompts,
    restate,
    with_end,
    write_all,
    write_with_transformers,
)

TIED = {"untie_embeddings_and_output_weights": False, "scale_lm_output": True}
UNTIED = {"untie_embeddings_and_output_weights": True, "scale_lm_output": False}
T5_MODELS: dict[str, dict[str, Any]] = {
    "v1.0": tiny.T5_V1_0,
    "v1.0 untied, unequal depth": {**tiny.T5_V1_0, **UNTIED, "encoder_num_layers": 1, "decoder_num_layers": 3},
    "v1.1": tiny.T5_V1_1,
    "v1.1 tied, unequal depth, odd d_kv": {
        **tiny.T5_V1_1, **TIED, "encoder_num_layers": 3, "decoder_num_layers": 2, "kv_channels": 5,
    },
}  # fmt: skip
METRO_MODELS: dict[str, dict[str, Any]] = {
    "metro": {},
    "metro, bias per layer in the decoder, untied": {
        "relative_attention_decoder": True, "untie_embeddings_and_output_weights": True, "decoder_num_layers": 3,
    },
}  # fmt: skip
BEAMS = WritingOptions(decoding="beam", num_beams=4, max_new_tokens=10, length_penalty_form="hf", length_penalty=1.0)
PENALISED = {
    "beam, long texts preferred": replace(BEAMS, num_beams=3, length_penalty=2.0),
    "beam, short texts preferred": replace(BEAMS, num_beams=2, length_penalty=-0.5),
}
DECODINGS = {"greedy": WritingOptions(max_new_tokens=16), "beam": BEAMS, **PENALISED}
GNMT = WritingOptions(decoding="beam", num_beams=3, max_new_tokens=6)


@pytest.mark.parametrize(
    ("name", "decoding"),
    [*((name, decoding) for name in T5_MODELS for decoding in ("greedy", "beam")), *(("v1.1", d) for d in PENALISED)],
)
def test_t5_writes_what_transformers_writes(groups: ParallelGroups, name: str, decoding: str) -> None:
    texts = Texts(model=T5_MODELS[name], options=DECODINGS[decoding], ids=T5_IDS)
    model = build_model(texts, groups)
    texts = with_end(texts, model)
    assert_equal(write_all(texts, model), write_with_transformers(texts, build_t5(model)))


@pytest.mark.parametrize("decoding", ["greedy", "beam"])
def test_metro_without_bias_writes_what_bart_writes(groups: ParallelGroups, decoding: str) -> None:
    texts = Texts(model={}, options=DECODINGS[decoding], ids=METRO_IDS, zero_bias=True)
    model = build_model(texts, groups)
    texts = with_end(texts, model)
    assert_equal(write_all(texts, model), write_with_transformers(texts, build_bart(model)))


@pytest.mark.parametrize("options", [replace(DECODINGS["greedy"], max_new_tokens=8), GNMT], ids=["greedy", "gnmt"])
@pytest.mark.parametrize("name", METRO_MODELS)
def test_metro_writes_what_its_formulas_say(groups: ParallelGroups, name: str, options: WritingOptions) -> None:
    texts = Texts(model=METRO_MODELS[name], options=options, ids=METRO_IDS, num_prompts=8)
    model = build_model(texts, groups)
    texts = with_end(texts, model)
    assert_equal(write_all(texts, model), restate(texts, model), tolerance=1e-9)


@pytest.mark.parametrize("decoding", ["greedy", "beam", "sample"])
@pytest.mark.parametrize(("model", "ids"), [(tiny.T5_V1_1, T5_IDS), ({}, METRO_IDS)], ids=["t5", "metro"])
def test_company_and_padding_change_nothing(
    groups: ParallelGroups, model: dict[str, Any], ids: WritingIds, decoding: str
) -> None:
    options = {**DECODINGS, "sample": WritingOptions(decoding="sample", top_k=20, top_p=0.9, temperature=1.3)}[decoding]
    alone = Texts(model=model, options=replace(options, max_new_tokens=8), ids=ids, batch_size=1)
    built = build_model(alone, groups)
    alone = with_end(alone, built)
    expected = write_all(alone, built)
    for batch_size, reverse in ((3, False), (20, False), (7, True)):
        found = write_all(replace(alone, batch_size=batch_size, reverse=reverse), built)
        assert_equal(found, expected, tolerance=1e-9)


def test_texts_end_early_and_at_their_limit(groups: ParallelGroups) -> None:
    texts = Texts(model=tiny.T5_V1_1, options=DECODINGS["greedy"], ids=T5_IDS, num_prompts=40, batch_size=40)
    model = build_model(texts, groups)
    written = write_all(with_end(texts, model), model)
    assert len({len(text.ids) for text in written if text.has_ended}) > 3
    assert {len(text.ids) for text in written if not text.has_ended} == {16}


def test_a_batch_stops_when_all_its_texts_have_ended(groups: ParallelGroups) -> None:
    texts = Texts(model=tiny.T5_V1_1, options=DECODINGS["greedy"], ids=T5_IDS, num_prompts=40)
    model = build_model(texts, groups)
    texts = with_end(texts, model)
    ending = [number for number, text in enumerate(write_all(texts, model)) if text.has_ended]
    assert ending
    num_calls, write_next = 0, model.write

    def count(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        return write_next(*arguments, **options)

    model.write = count  # type: ignore[method-assign]
    prompts = [draw_prompts(40)[number] for number in ending]
    options = WritingOptions(max_new_tokens=10_000)
    found = write(model, pad_sources(prompts, 0, torch.device("cpu")), texts.ids, options, ending)
    assert num_calls == max(len(text.ids) for text in found) + 1


def _ignore_last(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *arguments: function(self, *arguments[:2])


MUTATIONS: dict[str, tuple[object, str, Callable[..., Any], dict[str, Any], str]] = {
    "beams read one another's keys": (OwnPast, "take", lambda self, rows: None, tiny.T5_V1_1, "beam"),
    "positions stand still": (PositionEmbeddings, "forward", _ignore_last(PositionEmbeddings.forward), {}, "greedy"),
    "distances stand still": (RelativeBias, "forward", _ignore_last(RelativeBias.forward), tiny.T5_V1_0, "greedy"),
    "padding of sources is read": (
        EncoderDecoder,
        "read",
        lambda self, sources, read=EncoderDecoder.read: read(self, replace(sources, padding=None)),
        tiny.T5_V1_0,
        "greedy",
    ),
    "draws go by place in the batch": (
        writing,
        "draw_uniforms",
        lambda seed, numbers, count, draw=writing.draw_uniforms: draw(seed, range(len(numbers)), count),
        tiny.T5_V1_1,
        "sample",
    ),
    "lengths are off by one": (
        beams,
        "_penalty",
        lambda options, length, penalty=beams._penalty: penalty(options, length + 1),
        tiny.T5_V1_0,
        "beam",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_is_compared_can_differ(groups: ParallelGroups, mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, broken, model, decoding = MUTATIONS[mutation]
    options = WritingOptions(decoding="sample", max_new_tokens=8) if decoding == "sample" else DECODINGS[decoding]
    texts = Texts(model=model, options=options, ids=T5_IDS if model else METRO_IDS)
    built = build_model(texts, groups)
    texts = with_end(texts, built)
    expected = write_all(texts, built)
    monkeypatch.setattr(place, name, broken)
    with pytest.raises(AssertionError):
        assert_equal(write_all(texts, built), expected)
