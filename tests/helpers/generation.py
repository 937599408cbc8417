"""Texts that tiny models write, under any layout, and the same texts from other people's decoders.

Everything is in float64, and weights are spread widely, so that no two candidates come close to a tie. Networks of
transformers get the weights of one process; their searches, which rank in FP32, are handed exact log-probabilities.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BartForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    T5ForConditionalGeneration,
)

from megatron_metro.config.chain import build_chain
from megatron_metro.config.schema import ModelConfig, ParallelConfig
from megatron_metro.device import activate
from megatron_metro.inference.options import WritingIds, WritingOptions
from megatron_metro.inference.pipeline import EncoderDecoder, Written, pad_sources
from megatron_metro.inference.scoring import score_choices
from megatron_metro.inference.writing import write
from megatron_metro.model.build import build_pieces
from megatron_metro.parallel.groups import ParallelGroups, reinitialise
from megatron_metro.parallel.layout import StageLayout
from tests.helpers import tiny
from tests.helpers.hf_t5 import fill, make_exact, name_main_model, t5_config
from tests.helpers.parity import local_noise
from tests.helpers.reference import ReferenceMetro
from tests.parity import test_bart

MAX_NEW_TOKENS = 12
# Standard deviations of what is added to weights, by parts of their names, so that texts differ by source and position:
# random models soon repeat themselves, Post-LN ones at once unless no sublayer outweighs the others.
PRE_NORM_SPREADS = {"cross_attention.linear_": 0.8, "relative_bias": 1.6, "": 0.4}
POST_NORM_SPREADS = {
    "cross_attention.linear_": 1.0,
    "relative_bias": 1.0,
    "norm.": 0.1,
    "bias": 0.1,
    "position_embeddings": 1.0,
    "": 0.25,
}
T5_IDS = WritingIds(start=0, end=1, pad=0)
METRO_IDS = WritingIds(start=2, end=2, pad=tiny.PAD_ID)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What is to be written."""

    model: dict[str, Any]  # changes of the tiny model
    options: WritingOptions
    ids: WritingIds
    num_prompts: int = 20
    batch_size: int = 8
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero_bias: bool = False  # BART has no relative bias
    reverse: bool = False  # prompts in other company

    @property
    def config(self) -> ModelConfig:
        return tiny.tiny_model(**{"generator_num_layers": 0, **self.model})


def build_model(texts: Texts, groups: ParallelGroups) -> EncoderDecoder:
    """The tiny model with wide weights that depend on their names alone, cut into equal pieces."""
    run = tiny.tiny_run(texts.config, texts.parallel)
    chain, pp = build_chain(run.model), texts.parallel.pipeline_model_parallel_size
    bounds = [round(i * len(chain) / pp) for i in range(pp + 1)]
    layout = StageLayout(pieces=tuple(chain[a:b] for a, b in pairwise(bounds)), pp_size=pp)
    [piece] = build_pieces(run, layout, groups, torch.float64, texts.ids.pad)
    place = SimpleNamespace(groups=groups, run=run)
    spreads = POST_NORM_SPREADS if run.model.norm_placement == "post" else PRE_NORM_SPREADS
    with torch.no_grad():
        for name, parameter in piece.named_parameters():
            if texts.zero_bias and "relative_bias" in name:
                parameter.zero_()
            else:
                spread = next(spread for part, spread in spreads.items() if part in name)
                parameter.add_(local_noise(place, name, parameter, spread))
    return EncoderDecoder(piece, layout, groups)


def with_end(texts: Texts, model: EncoderDecoder) -> Texts:
    """The same with an end token that about half of the texts have: random models rarely write a given one."""
    endless = replace(texts, options=WritingOptions(max_new_tokens=8), ids=replace(texts.ids, end=-1))
    counts = Counter(token for text in write_all(endless, model) for token in set(text.ids))
    end = min(counts, key=lambda token: (abs(2 * counts[token] - texts.num_prompts), token))
    return replace(texts, ids=replace(texts.ids, end=end))


def draw_prompts(count: int) -> list[list[int]]:
    """Prompts of 1 to 24 tokens."""
    rng = np.random.default_rng(5)
    return [rng.integers(4, tiny.VOCAB_SIZE, size=rng.integers(1, 25)).tolist() for _ in range(count)]


def write_all(texts: Texts, model: EncoderDecoder) -> list[Written]:
    """Every prompt's text, in batches."""
    numbered = list(enumerate(draw_prompts(texts.num_prompts)))
    if texts.reverse:
        numbered.reverse()
    answers: dict[int, Written] = {}
    for start in range(0, len(numbered), texts.batch_size):
        numbers, prompts = zip(*numbered[start : start + texts.batch_size])
        sources = pad_sources(list(prompts), texts.ids.pad, model.device)
        answers |= zip(numbers, write(model, sources, texts.ids, texts.options, numbers))
    return [answers[number] for number in range(texts.num_prompts)]


def write_on_worker(cases: Sequence[Texts]) -> list[list[Written]]:
    """Every case on this rank of a pool, at the cases' common layout."""
    groups = reinitialise(cases[0].parallel)
    activate("cpu").seed_all(1, tp_rank=groups.tp_rank)
    return [write_all(case, build_model(case, groups)) for case in cases]


def draw_choices(num_examples: int, ids: WritingIds) -> list[list[list[int]]]:
    """One to four targets per example, of different lengths, with end tokens."""
    rng = np.random.default_rng(6)
    return [
        [[*rng.integers(4, tiny.VOCAB_SIZE, size=rng.integers(0, 7)).tolist(), ids.end] for _ in range(1 + number % 4)]
        for number in range(num_examples)
    ]


def score_all(texts: Texts, model: EncoderDecoder) -> list[list[float]]:
    """Log-probabilities of `draw_choices`, in batches."""
    prompts, choices = draw_prompts(texts.num_prompts), draw_choices(texts.num_prompts, texts.ids)
    scores: list[list[float]] = []
    for start in range(0, len(prompts), texts.batch_size):
        batch = slice(start, start + texts.batch_size)
        sources = pad_sources(prompts[batch], texts.ids.pad, model.device)
        scores += score_choices(model, sources, choices[batch], texts.ids)
    return scores


def score_on_worker(texts: Texts) -> list[list[float]]:
    """As `score_all`, on this rank of a pool."""
    groups = reinitialise(texts.parallel)
    activate("cpu").seed_all(1, tp_rank=groups.tp_rank)
    return score_all(texts, build_model(texts, groups))


def build_t5(model: EncoderDecoder) -> T5ForConditionalGeneration:
    """transformers' T5 with the weights of one of ours in one process."""
    config = model.piece.context.model
    network = T5ForConditionalGeneration(t5_config(config)).double().eval()
    if config.untie_embeddings_and_output_weights:
        network.lm_head.weight = nn.Parameter(network.lm_head.weight.detach().clone())
    make_exact(network)
    weights = {name: parameter.detach().numpy() for name, parameter in model.piece.named_parameters()}
    rows = {
        name: weights[name][: tiny.VOCAB_SIZE]
        for name in ("word_embeddings.weight", "lm_head.weight")
        if name in weights
    }
    fill(network, name_main_model(config), weights | rows)
    return network


def build_bart(model: EncoderDecoder) -> BartForConditionalGeneration:
    """transformers' BART with the weights of a METRO without relative bias."""
    engine = SimpleNamespace(pieces=[model.piece], run=SimpleNamespace(model=model.piece.context.model))
    bart = test_bart.build_bart(engine, torch.float64).eval()
    bart.generation_config.forced_eos_token_id = None
    return bart


@torch.no_grad()
def restate(texts: Texts, model: EncoderDecoder) -> list[Written]:
    """METRO's texts, greedy or by beams in T5's form: lists, plain Python, every prefix from the beginning."""
    weights = {name: parameter.detach() for name, parameter in model.piece.named_parameters()}
    oracle = ReferenceMetro(weights, model.piece.context.model, pad_id=tiny.PAD_ID)
    search = _search_plainly if texts.options.decoding == "beam" else _climb_plainly
    answers = []
    for prompt in draw_prompts(texts.num_prompts):
        memory = oracle.encode("encoder", torch.tensor([prompt]), None)

        def continue_(prefix: Sequence[int], memory: Tensor = memory) -> Tensor:
            states = oracle.decode(torch.tensor([[texts.ids.start, *prefix]]), None, memory, None)
            return oracle.project(states[0, -1]).log_softmax(-1)

        answers.append(search(continue_, texts))
    return answers


def _climb_plainly(continue_: Callable[[Sequence[int]], Tensor], texts: Texts) -> Written:
    ids: list[int] = []
    score = 0.0
    while len(ids) < texts.options.max_new_tokens and texts.ids.end not in ids:
        log_probs = continue_(ids)
        ids.append(int(log_probs.argmax()))
        score += float(log_probs[ids[-1]])
    return _cut(ids, score, texts.ids.end)


def _search_plainly(continue_: Callable[[Sequence[int]], Tensor], texts: Texts) -> Written:
    """Without the stop: all beams go on to the greatest length, which can only find better texts."""
    options, end = texts.options, texts.ids.end
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, options.max_new_tokens + 1):
        all_ = [(s + float(p), [*ids, i]) for s, ids in beams for i, p in enumerate(continue_(ids))]
        best = sorted(all_, key=lambda entry: -entry[0])[: 2 * options.num_beams]
        ends = [length == options.max_new_tokens or ids[-1] == end for _, ids in best]
        penalty = ((5 + length) / 6) ** options.length_penalty
        finished += [(s / penalty, ids) for (s, ids), e in list(zip(best, ends))[: options.num_beams] if e]
        beams = [entry for entry, e in zip(best, ends) if not e][: options.num_beams]
    score, ids = max(finished, key=lambda entry: entry[0])
    return _cut(ids, score, end)


def _cut(ids: list[int], score: float, end: int) -> Written:
    has_ended = end in ids
    return Written(ids=tuple(ids[: ids.index(end)] if has_ended else ids), score=score, has_ended=has_ended)


class ExactScores(LogitsProcessor):
    """Hands a search of transformers what the network itself computed, in place of its rounding to FP32."""

    def __init__(self, network: nn.Module, *, as_log_probs: bool) -> None:
        self.as_log_probs = as_log_probs
        self.logits: Tensor | None = None
        network.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, arguments: tuple, output: Any) -> None:
        self.logits = output.logits[:, -1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert self.logits is not None and self.logits.dtype == torch.float64
        assert torch.allclose(
            scores.double(), self.logits.log_softmax(-1) if self.as_log_probs else self.logits, atol=1e-4
        )
        return self.logits.log_softmax(-1) if self.as_log_probs else self.logits


@torch.no_grad()
def write_with_transformers(texts: Texts, network: PreTrainedModel) -> list[Written]:
    """Every prompt's text and score by `generate`, each on its own: nothing is padded."""
    options, is_beam = texts.options, texts.options.decoding == "beam"
    exact = ExactScores(network, as_log_probs=is_beam)
    # transformers makes the cache of a T5 as deep as its encoder.
    has_cache = texts.config.decoder_num_layers <= texts.config.encoder_num_layers
    how: dict[str, Any] = {"num_beams": 1}
    if is_beam:
        assert options.length_penalty_form == "hf"
        how = {"num_beams": options.num_beams, "length_penalty": options.length_penalty, "early_stopping": False}
    answers = []
    for prompt in draw_prompts(texts.num_prompts):  # one at a time: no padding, nothing beside it
        output = network.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=options.max_new_tokens, use_cache=has_cache,
            decoder_start_token_id=texts.ids.start, eos_token_id=texts.ids.end, pad_token_id=texts.ids.pad,
            logits_processor=LogitsProcessorList([exact]), return_dict_in_generate=True, output_scores=True, **how,
        )  # fmt: skip
        row = output.sequences[0, 1:].tolist()
        score = float(output.sequences_scores[0]) if is_beam else sum_log_probs(output.scores, row, texts.ids.end)
        answers.append(_cut(row, score, texts.ids.end))
    return answers


def sum_log_probs(logits: Sequence[Tensor], row: Sequence[int], end: int) -> float:
    """Of the tokens of a row up to its end."""
    length = row.index(end) + 1 if end in row else len(row)
    return sum(float(logits[i][0].log_softmax(-1)[row[i]]) for i in range(length))


def assert_equal(found: Sequence[Written], expected: Sequence[Written], tolerance: float = 1e-4) -> None:
    """Token for token, and scores; the texts must differ among themselves and end at different places."""
    assert [text.ids for text in found] == [text.ids for text in expected]
    assert [text.has_ended for text in found] == [text.has_ended for text in expected]
    assert all(
        math.isclose(a.score, b.score, rel_tol=0, abs_tol=tolerance) for a, b in zip(found, expected, strict=True)
    )
    assert len({text.ids for text in found}) > len(found) / 5, "the model writes the same whatever it reads"
