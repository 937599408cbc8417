"""Restoration of corrupted blocks against the plain-PyTorch METRO, which decodes token by token."""

from dataclasses import replace

import pytest
import torch

from megatron_metro.batch import Microbatch
from megatron_metro.config.chain import build_chain
from megatron_metro.config.errors import ConfigError
from megatron_metro.config.schema import ObjectiveConfig
from megatron_metro.inference.restore import Restoration, count_repaired, restore_blocks
from megatron_metro.model.piece import ChainPiece
from megatron_metro.parallel.layout import single_piece
from megatron_metro.training.engine import Engine
from tests.helpers import tiny
from tests.helpers.parity import perturb
from tests.helpers.reference import ReferenceMetro

Expected = tuple[list[int], list[float], list[int]]  # corrupted block, RTD probabilities, greedy ids at the slots


def make_piece(groups, objective: ObjectiveConfig | None = None, **model) -> ChainPiece:
    run = tiny.tiny_run(tiny.tiny_model(**model), objective=objective)
    engine = Engine(run, single_piece(build_chain(run.model)), groups, torch.float64, pad_id=tiny.PAD_ID)
    perturb(engine)
    return engine.pieces[0]


@torch.no_grad()
def restore_with_oracle(piece: ChainPiece, batch: Microbatch) -> list[Expected]:
    weights = {name: parameter.detach() for name, parameter in piece.named_parameters()}
    oracle = ReferenceMetro(weights, piece.context.model, pad_id=tiny.PAD_ID)
    corrupted, padding = oracle.run([batch]).corrupted[0], batch.encoder_padding
    memory = oracle.encode("encoder", corrupted, padding)
    probs = oracle.detect(memory).sigmoid()
    results = []
    for row, tokens in enumerate(corrupted):
        is_real = torch.ones_like(tokens, dtype=torch.bool) if padding is None else ~padding[row]
        slots = batch.masked_slots[row][batch.masked_valid[row]].tolist()
        one = slice(row, row + 1)
        prefix, greedy = batch.decoder_tokens[one, :1], []
        for position in range(int(is_real.sum())):
            written = tokens[position : position + 1]
            if position in slots:
                states = oracle.decode(prefix, None, memory[one], None if padding is None else padding[one])
                logits = oracle.project(states)
                written = logits[0, -1:].argmax(-1)
                greedy.append(int(written))
            prefix = torch.cat([prefix, written[None]], dim=1)
        results.append((tokens[is_real].tolist(), probs[row][is_real].tolist(), greedy))
    return results


def test_without_an_rtd_head_there_are_no_verdicts(groups):
    piece, batch = make_piece(groups, rtd_head="none"), tiny.metro_batch(2, seed=31)
    assert [block.replaced_probs for block in restore_blocks(piece, batch)] == [(), ()]


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_restoration_equals_the_oracle(groups, padded):
    piece, batch = make_piece(groups), tiny.metro_batch(4, seed=31, padded=padded)
    blocks = restore_blocks(piece, batch)
    assert len(blocks) == 4
    for row, (block, (filled, probs, greedy)) in enumerate(zip(blocks, restore_with_oracle(piece, batch))):
        assert list(block.filled_ids) == filled
        assert list(block.restored_ids) == greedy
        assert block.replaced_probs == pytest.approx(probs, abs=1e-9)
        assert list(block.original_ids) == batch.encoder_tokens[row][: len(filled)].tolist()
        assert list(block.masked_slots) == batch.masked_slots[row][batch.masked_valid[row]].tolist()


@pytest.mark.parametrize("copies", [False, True])
def test_an_encoder_alone_restores_by_its_lm_head(groups, copies):
    objective = ObjectiveConfig(objective="electra")
    model = {"decoder_num_layers": 0, "encoder_lm_head": True, "copy_mechanism": copies}
    piece, batch = make_piece(groups, objective, **model), tiny.metro_batch(4, seed=31)
    batch = replace(batch, decoder_tokens=batch.decoder_tokens[:, :0])
    weights = {name: parameter.detach() for name, parameter in piece.named_parameters()}
    oracle = ReferenceMetro(weights, piece.context.model, pad_id=tiny.PAD_ID)
    with torch.no_grad():
        corrupted = batch.encoder_tokens.clone()
        _, sampled = oracle.fill(batch)
        for row, slot in batch.masked_valid.nonzero().tolist():
            corrupted[row, batch.masked_slots[row, slot]] = sampled[row, slot]
        states = oracle.encode("encoder", corrupted, None)
        probs, replaced = oracle.project(states).softmax(-1), oracle.detect(states).sigmoid()
        if copies:
            probs = probs * replaced[..., None]
            probs.scatter_add_(2, corrupted[..., None], 1 - replaced[..., None])
        greedy = probs.argmax(-1)
    for row, block in enumerate(restore_blocks(piece, batch)):
        slots = batch.masked_slots[row][batch.masked_valid[row]]
        assert list(block.filled_ids) == corrupted[row].tolist()
        assert list(block.restored_ids) == greedy[row, slots].tolist()
        assert block.replaced_probs == pytest.approx(replaced[row].tolist(), abs=1e-9)


def test_all_positions_as_targets_restore_the_masked_ones(groups):
    objective, batch = ObjectiveConfig(lm_targets="all"), tiny.metro_batch(4, seed=31)
    expected = restore_blocks(make_piece(groups), batch)
    assert restore_blocks(make_piece(groups, objective), tiny.objective_batch(objective, 4, seed=31)) == expected


def test_a_decoder_of_masked_tokens_alone_reads_what_it_wrote(groups):
    objective = ObjectiveConfig(lm_targets="masked-only")
    piece, batch = make_piece(groups, objective), tiny.objective_batch(objective, 4, seed=31)
    weights = {name: parameter.detach() for name, parameter in piece.named_parameters()}
    oracle = ReferenceMetro(weights, piece.context.model, pad_id=tiny.PAD_ID)
    blocks = restore_blocks(piece, batch)
    for block in blocks:
        memory, prefix = oracle.encode("encoder", torch.tensor([block.filled_ids]), None), batch.decoder_tokens[:1, :1]
        for written in block.restored_ids:
            states = oracle.decode(prefix, None, memory, None)
            assert int(oracle.project(states)[0, -1].argmax()) == written
            prefix = torch.cat([prefix, torch.tensor([[written]])], dim=1)
    assert sum(len(block.restored_ids) for block in blocks) > 8


@pytest.mark.parametrize(
    ("objective", "model", "said"),
    [
        ("metro", {"generator_num_layers": 0}, "--generator-num-layers 0"),
        ("electra", {"decoder_num_layers": 0}, "--encoder-lm-head"),
        ("spactor", {}, "--objective spactor"),
    ],
)
def test_a_model_that_restores_nothing_is_refused_in_one_line(groups, objective, model, said):
    config = ObjectiveConfig(objective=objective)
    with pytest.raises(ConfigError, match=said) as caught:
        restore_blocks(make_piece(groups, config, **model), tiny.objective_batch(config, 4, seed=31))
    assert "\n" not in str(caught.value) and "give" in str(caught.value)


def test_the_original_tokens_at_masked_positions_stay_hidden(groups):
    piece, batch = make_piece(groups), tiny.metro_batch(4, seed=32)
    tokens = batch.decoder_tokens.clone()
    for row, column in batch.masked_valid.nonzero().tolist():
        position = int(batch.masked_slots[row, column]) + 1
        if position < tiny.LENGTH:
            tokens[row, position] = 7
    assert not torch.equal(tokens, batch.decoder_tokens)
    blind = restore_blocks(piece, replace(batch, decoder_tokens=tokens))
    assert [block.restored_ids for block in blind] == [block.restored_ids for block in restore_blocks(piece, batch)]


def test_dropout_is_off_and_the_mode_comes_back(groups):
    piece, batch = make_piece(groups, hidden_dropout=0.5, attention_dropout=0.5), tiny.metro_batch(4, seed=33)
    piece.train()
    assert restore_blocks(piece, batch) == restore_blocks(piece, batch)
    assert piece.training


def test_slots_and_counts_of_a_block():
    block = Restoration(
        original_ids=(10, 11, 12, 13, 14),
        masked_slots=(0, 2, 4),
        filled_ids=(10, 11, 99, 13, 98),
        replaced_probs=(0.1, 0.1, 0.9, 0.1, 0.9),
        restored_ids=(7, 12, 8),
    )
    assert block.replaced_slots == (2, 4)
    assert block.repaired_slots == (2,)
    assert count_repaired([block, block]) == (2, 4)
