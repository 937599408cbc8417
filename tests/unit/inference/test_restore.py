"""Restoration of corrupted blocks against the plain-PyTorch METRO, which decodes token by token."""

from dataclasses import replace

import pytest
import torch

from megatron_metro.batch import Microbatch
from megatron_metro.config.chain import build_chain
from megatron_metro.inference.restore import Restoration, count_repaired, restore_blocks
from megatron_metro.model.piece import ChainPiece
from megatron_metro.parallel.layout import single_piece
from megatron_metro.training.engine import Engine
from tests.helpers import tiny
from tests.helpers.parity import perturb
from tests.helpers.reference import ReferenceMetro

Expected = tuple[list[int], list[float], list[int]]  # corrupted block, RTD probabilities, greedy ids at the slots


def make_piece(groups, **model) -> ChainPiece:
    run = tiny.tiny_run(tiny.tiny_model(**model))
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
