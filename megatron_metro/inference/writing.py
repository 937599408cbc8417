"""Write after sources, token by token: the most likely one each time, or one drawn at random.

Shape letters: b sources, t tokens written at most.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_metro.data.randomness import BlockKeys, Purpose, draw_words, to_uniforms
from megatron_metro.inference.beams import search_beams
from megatron_metro.inference.options import WritingIds, WritingOptions
from megatron_metro.inference.picking import pick_at_random, pick_best
from megatron_metro.inference.pipeline import EncoderDecoder, Sources, Written, cut_at_end


def write(
    model: EncoderDecoder, sources: Sources, ids: WritingIds, options: WritingOptions, requests: Sequence[int]
) -> list[Written]:
    """One text for each source. `requests` are numbers by which sampling tells sources apart.

    A text is a function of its source and, in sampling, of (seed, request number): not of the batch it is written in.
    """
    if options.decoding == "beam":
        return search_beams(model, sources, ids, options)
    uniforms = None
    if options.decoding == "sample":
        uniforms = draw_uniforms(options.seed, requests, options.max_new_tokens).to(model.device)
    return _write_one_by_one(model, sources, ids, options, uniforms)


def draw_uniforms(seed: int, requests: Sequence[int], count: int) -> Tensor:
    """[b, count] float64 in [0, 1): number i of a request decides its i-th token; functions of seed and request."""
    keys = BlockKeys(
        seed=seed,
        identity=np.zeros(len(requests), dtype=np.uint64),
        epoch=np.zeros(len(requests), dtype=np.int64),
        block=np.asarray(requests, dtype=np.int64),
    )
    return torch.from_numpy(to_uniforms(draw_words(keys, Purpose.WRITING, count)))


def _write_one_by_one(
    model: EncoderDecoder, sources: Sources, ids: WritingIds, options: WritingOptions, uniforms_BT: Tensor | None
) -> list[Written]:
    state = model.read(sources)
    read_B1 = torch.full((len(sources.tokens), 1), ids.start, device=model.device)
    score_B = torch.zeros(len(read_B1), dtype=torch.float64, device=model.device)
    has_ended_B = torch.zeros_like(score_B, dtype=torch.bool)
    columns: list[Tensor] = []
    while len(columns) < options.max_new_tokens and not has_ended_B.all():
        pick = partial(_pick, model, options, None if uniforms_BT is None else uniforms_BT[:, len(columns)])
        picked_B2 = model.write(state, read_B1, pick, width=2)
        written_B = torch.where(has_ended_B, ids.pad, picked_B2[:, 0].long())
        score_B += torch.where(has_ended_B, 0.0, picked_B2[:, 1])
        has_ended_B |= written_B == ids.end
        read_B1 = written_B[:, None]
        columns.append(written_B)
    return cut_at_end(torch.stack(columns, dim=1), score_B, ids.end)


def _pick(
    model: EncoderDecoder, options: WritingOptions, uniforms_B: Tensor | None, logits_NV: Tensor, rows: slice
) -> Tensor:
    if uniforms_B is None:
        return pick_best(logits_NV, model.shard)
    return pick_at_random(
        logits_NV,
        model.shard,
        uniforms_B[rows],
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
