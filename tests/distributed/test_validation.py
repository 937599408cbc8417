"""Decoder accuracies of validation, at masked slots and with --eval-all-positions, against the plain-PyTorch METRO."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_metro.batch import Microbatch
from megatron_metro.config.schema import ObjectiveConfig, ParallelConfig, RunConfig
from megatron_metro.device import activate
from megatron_metro.parallel.groups import ParallelGroups, reinitialise
from megatron_metro.parallel.stage_plan import plan_layout
from megatron_metro.training.engine import Engine
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.parity import perturb
from tests.helpers.reference import ReferenceMetro

LAYOUTS = {
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "tp2 sp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "dp2": ParallelConfig(),
}


WORDS = range(4, 8)  # the only tokens of the text, so that an untrained model is often right


def make_run(parallel: ParallelConfig, *, all_positions: bool) -> RunConfig:
    model = tiny.tiny_model(untie_embeddings_and_output_weights=True)
    return tiny.tiny_run(model, parallel, ObjectiveConfig(eval_all_positions=all_positions))


def make_microbatches() -> list[Microbatch]:
    """Four; the 16 positions of the decoder do not divide into chunks of 7 slots."""
    return [_simplify(tiny.metro_batch(2, seed, padded=True)) for seed in range(4)]


def _simplify(batch: Microbatch) -> Microbatch:
    names = ("target_slots", "target_ids", "target_valid", "masked_slots", "masked_ids", "masked_valid", "uniforms")
    values = {name: getattr(batch, name)[:, :7] for name in names}
    for name in ("encoder_tokens", "decoder_tokens", "generator_tokens"):
        values[name] = getattr(batch, name)
    for name in ("encoder_tokens", "decoder_tokens", "generator_tokens", "target_ids", "masked_ids"):
        values[name] = torch.where(values[name] > WORDS.start, WORDS.start + values[name] % len(WORDS), values[name])
    return replace(batch, **values)


def build_engine(run: RunConfig, groups: ParallelGroups) -> Engine:
    """A model whose generator and decoder mostly write the words of the text."""
    activate("cpu").seed_all(1, tp_rank=groups.tp_rank)
    engine = Engine(run, plan_layout(run), groups, torch.float64, pad_id=tiny.PAD_ID)
    perturb(engine, scale=0.3)
    with torch.no_grad():
        for piece in engine.pieces:
            shard = piece.context.shard
            is_word = torch.tensor([i in WORDS for i in range(shard.first, shard.first + shard.num_columns)])
            if hasattr(piece, "lm_head"):
                piece.lm_head.weight[~is_word] = 0.0
            if hasattr(piece, "mlm_head"):
                piece.mlm_head.output_bias[is_word] += 8.0
    return engine


def evaluate(run: RunConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of a validation, and of the same microbatches in a training step."""
    groups = reinitialise(run.parallel)
    engine = build_engine(run, groups)
    mine = make_microbatches()[groups.dp_rank :: groups.dp_size]
    return engine.evaluate([mine[:1], mine[1:]]), engine.accumulate_gradients(mine)


def score_with_oracle(groups: ParallelGroups, *, all_positions: bool) -> dict[str, float]:
    """Replaced and unreplaced accuracy from logits at every position."""
    engine = build_engine(make_run(ParallelConfig(), all_positions=all_positions), groups)
    weights = {name: parameter.detach() for name, parameter in engine.pieces[0].named_parameters()}
    oracle = ReferenceMetro(weights, engine.run.model, pad_id=tiny.PAD_ID)
    right, replaced = [], []
    for batch in make_microbatches():
        corrupted = oracle.run([batch]).corrupted[0]
        memory = oracle.encode("encoder", corrupted, batch.encoder_padding)
        logits = oracle.project(oracle.decode(batch.decoder_tokens, None, memory, batch.encoder_padding))
        is_scored = ~batch.encoder_padding
        if not all_positions:
            dump = torch.zeros_like(batch.encoder_tokens[:, :1])
            is_masked = torch.cat([torch.zeros_like(batch.encoder_tokens), dump], dim=1)
            is_scored = is_masked.scatter(1, batch.masked_slots, 1)[:, :-1] > 0
        right.append((logits.argmax(-1) == batch.encoder_tokens)[is_scored])
        replaced.append((corrupted != batch.encoder_tokens)[is_scored])
    hits, is_replaced = torch.cat(right).double(), torch.cat(replaced)
    return {
        "replaced accuracy": 100 * float(hits[is_replaced].mean()),
        "unreplaced accuracy": 100 * float(hits[~is_replaced].mean()),
    }


@pytest.mark.parametrize("all_positions", [False, True], ids=["slots", "all positions"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracies_equal_the_oracle(
    layout: str, all_positions: bool, pool: Callable[[int], WorkerPool], groups: ParallelGroups
) -> None:
    expected = score_with_oracle(groups, all_positions=all_positions)
    at_slots = score_with_oracle(groups, all_positions=False)
    for validation, training in pool(2).run(evaluate, make_run(LAYOUTS[layout], all_positions=all_positions)):
        for name, value in expected.items():
            assert validation[name] == pytest.approx(value, abs=1e-9), name
            assert training[name] == pytest.approx(at_slots[name], abs=1e-9), name


def test_all_positions_differ_from_slots(groups: ParallelGroups) -> None:
    everywhere, at_slots = (score_with_oracle(groups, all_positions=flag) for flag in (True, False))
    assert all(0.0 < value < 100.0 for scores in (everywhere, at_slots) for value in scores.values())
    assert everywhere["replaced accuracy"] == at_slots["replaced accuracy"]  # only masked positions are replaced
    assert everywhere["unreplaced accuracy"] != at_slots["unreplaced accuracy"]
