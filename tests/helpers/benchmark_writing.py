"""Speed of writing and scoring on one CPU thread: against recomputation, against transformers, with shared encoding."""

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration

from megatron_metro.config.chain import build_chain
from megatron_metro.config.schema import ModelConfig, RunConfig
from megatron_metro.inference.options import WritingIds, WritingOptions
from megatron_metro.inference.picking import pick_best
from megatron_metro.inference.pipeline import EncoderDecoder, Sources
from megatron_metro.inference.scoring import score_choices
from megatron_metro.inference.writing import write
from megatron_metro.model.build import build_pieces
from megatron_metro.model.past import LayerPast, WritingState
from megatron_metro.parallel.layout import single_piece
from megatron_metro.training.benchmark import Timing, start_process, time_side_by_side
from tests.helpers import tiny
from tests.helpers.hf_t5 import fill, name_main_model, t5_config

BATCH_SIZE, SOURCE_LENGTH, NUM_CHOICES, CHOICE_LENGTH = 8, 256, 4, 16
NUM_NEW_TOKENS = 64  # against transformers
NUM_CACHED_TOKENS = 256  # against recomputation
IDS = WritingIds(start=0, end=-1, pad=0)  # no text ends early
SIZES: dict[str, Any] = {
    "hidden_size": 256, "ffn_hidden_size": 1024, "num_attention_heads": 4, "encoder_num_layers": 4,
    "decoder_num_layers": 4, "vocab_size": 33_280, "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128, "hidden_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip


def build_model() -> EncoderDecoder:
    """A T5 v1.0 of the size that targets are stated for, in FP32."""
    run = RunConfig(model=replace(ModelConfig(), **tiny.T5_V1_0, **SIZES))
    groups, layout = start_process(), single_piece(build_chain(run.model))
    [piece] = build_pieces(run, layout, groups, torch.float32, IDS.pad)
    return EncoderDecoder(piece, layout, groups)


def build_peer(model: EncoderDecoder) -> T5ForConditionalGeneration:
    """transformers' T5 with the same weights."""
    network = T5ForConditionalGeneration(t5_config(model.piece.context.model)).eval()
    weights = {name: parameter.detach().numpy() for name, parameter in model.piece.named_parameters()}
    fill(network, name_main_model(model.piece.context.model), weights)
    network.generation_config.eos_token_id = None
    return network


@torch.no_grad()
def write_again_and_again(model: EncoderDecoder, sources: Sources, num_tokens: int) -> Tensor:
    """Greedy ids [b, t] of a decoder that reads the whole prefix for every token; the source is read once."""
    known = model.read(sources)
    tokens = torch.full((len(sources.tokens), 1), IDS.start)
    for _ in range(num_tokens):
        forgetful = WritingState(
            source_mask=known.source_mask,
            layers={number: LayerPast(source=past.source) for number, past in known.layers.items()},
        )
        hidden = model.piece.write(tokens, None, forgetful)
        picked = pick_best(model.piece.project(hidden[-1]), model.shard)
        tokens = torch.cat([tokens, picked[:, :1].long()], dim=1)
    return tokens[:, 1:]


def measure_writing(num_rounds: int, num_warmups: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Median ratios and rates; recomputation, which takes long, is timed once."""
    model = build_model()
    peer = build_peer(model)
    generator = np.random.default_rng(3)
    tokens = torch.from_numpy(generator.integers(3, SIZES["vocab_size"], (BATCH_SIZE, SOURCE_LENGTH)))
    sources = Sources(tokens=tokens, padding=None)
    choices = generator.integers(3, SIZES["vocab_size"], (BATCH_SIZE, NUM_CHOICES, CHOICE_LENGTH)).tolist()
    numbers = range(BATCH_SIZE)

    def write_ours(length: int) -> list[tuple[int, ...]]:
        return [text.ids for text in write(model, sources, IDS, WritingOptions(max_new_tokens=length), numbers)]

    def write_theirs() -> list[tuple[int, ...]]:
        how = {"do_sample": False, "num_beams": 1, "max_new_tokens": NUM_NEW_TOKENS, "use_cache": True}
        return [tuple(row[1:]) for row in peer.generate(tokens, **how).tolist()]

    def score_one_by_one() -> list[list[float]]:
        columns = [score_choices(model, sources, [[row[i]] for row in choices], IDS) for i in range(NUM_CHOICES)]
        return [[float(score) for [score] in row] for row in zip(*columns)]

    timings = time_side_by_side(
        {
            "ours": lambda: write_ours(NUM_NEW_TOKENS),
            "hf": write_theirs,
            "shared": lambda: score_choices(model, sources, choices, IDS),
            "one by one": score_one_by_one,
        },
        num_rounds,
        num_warmups,
        report,
    )
    long = time_side_by_side(
        {
            "cached": lambda: write_ours(NUM_CACHED_TOKENS),
            "recomputed": lambda: write_again_and_again(model, sources, NUM_CACHED_TOKENS),
        },
        1,
        0,
        report,
    )
    return {
        "tokens_per_second": round(BATCH_SIZE * NUM_NEW_TOKENS / _median(timings["ours"]), 1),
        "hf_tokens_per_second": round(BATCH_SIZE * NUM_NEW_TOKENS / _median(timings["hf"]), 1),
        "speedup_over_hf": round(_ratio(timings["hf"], timings["ours"]), 3),
        "same_tokens_as_hf": write_ours(NUM_NEW_TOKENS) == write_theirs(),
        "speedup_over_recomputation": round(_ratio(long["recomputed"], long["cached"]), 3),
        "shared_encoder_speedup": round(_ratio(timings["one by one"], timings["shared"]), 3),
        "num_threads": torch.get_num_threads(),
        "batch_size": BATCH_SIZE,
    }


def _median(timings: list[Timing]) -> float:
    return median(timing.processor for timing in timings)


def _ratio(slow: list[Timing], fast: list[Timing]) -> float:
    """Median over rounds of the ratio within a round."""
    return median(a.processor / b.processor for a, b in zip(slow, fast))
