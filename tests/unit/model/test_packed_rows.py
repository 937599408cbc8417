"""Masks and positions of packed rows, spelt out."""

import torch

from megatron_metro.model.layer import AttentionInputs
from megatron_metro.model.packed_rows import count_positions, ignored_keys, take_queries

SOURCES = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 1, 1, 1, 2, 2]])
TARGETS = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 2]])


def test_nothing_is_ignored_where_rows_are_one_text():
    assert ignored_keys(None) is None
    padding = torch.tensor([[False, True]])
    assert torch.equal(ignored_keys(padding), padding[:, None, None, :])


def test_queries_see_their_own_example_alone():
    for queries, keys in ((SOURCES, SOURCES), (TARGETS, SOURCES), (TARGETS, TARGETS)):
        mask = ignored_keys(SOURCES < 0, queries, keys)
        for row in range(2):
            for i, query in enumerate(queries[row].tolist()):
                assert mask[row, 0, i].tolist() == [key != query for key in keys[row].tolist()]
        assert not mask.all(dim=-1).any()  # every query sees something, or its attention would be 0/0


def test_positions_begin_anew():
    assert count_positions(SOURCES).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 1]]
    assert count_positions(TARGETS).tolist() == [[0, 0, 1, 2], [0, 1, 0, 0]]


def test_queries_at_slots_take_their_rows():
    own, other = ignored_keys(None, TARGETS, TARGETS), ignored_keys(SOURCES < 0, TARGETS, SOURCES)
    slots = torch.tensor([[1, 3, 4], [0, 2, 3]])  # 4: unused
    inputs = AttentionInputs(mask=own, context_mask=other).at_slots(slots, 4, is_causal=True)
    for row in range(2):
        for number, slot in enumerate(slots[row].clamp(max=3).tolist()):
            assert inputs.context_mask[row, 0, number].tolist() == other[row, 0, slot].tolist()
            future = [key > slot for key in range(4)]
            wanted = [a or b for a, b in zip(own[row, 0, slot].tolist(), future)]
            assert inputs.mask[row, 0, number].tolist() == wanted
    assert take_queries(None, slots) is None
    padding = ignored_keys(SOURCES < 0)
    assert take_queries(padding, slots) is padding
