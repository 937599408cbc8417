"""Transforms place rows where attention and feed-forward look for them, and splitting undoes joining."""

import pytest
import torch

from megatron_metro.conversion.mapping import BelowZeros, Heads, Rows, Rule, Same

WHOLE = torch.arange(2 * 3 * 5 * 4).float().view(-1, 4)  # two heads of width 5, three parts, four columns


def test_heads_lie_side_by_side():
    query, key, value = Heads(3, 5).split(WHOLE)
    for head in range(2):
        first = head * 3 * 5
        for place, part in enumerate((query, key, value)):
            rows = WHOLE[first + place * 5 : first + (place + 1) * 5]
            assert torch.equal(part[head * 5 : (head + 1) * 5], rows)


def test_gates_stand_before_values():
    gates, values = Rows(2).split(WHOLE)
    assert torch.equal(gates, WHOLE[:15]) and torch.equal(values, WHOLE[15:])


def test_unused_rows_are_zero():
    joined = BelowZeros(2).join([WHOLE])
    assert not joined[:2].any() and torch.equal(joined[2:], WHOLE)


@pytest.mark.parametrize("transform", [Same(), Heads(3, 5), Heads(2, 5), Rows(2), Rows(3)], ids=str)
@pytest.mark.parametrize("shape", [(30, 4), (30,), (60, 1)])
def test_splitting_undoes_joining(transform, shape):
    weight = torch.randn(shape)
    parts = transform.split(weight)
    assert torch.equal(transform.join(parts), weight)
    assert all(part.is_contiguous() for part in parts)


def test_shapes_of_parts_need_no_numbers():
    rule = Rule(ours="a", theirs=("q", "k", "v"), transform=Heads(3, 5))
    assert rule.list_parts((30, 4)) == {"q": (10, 4), "k": (10, 4), "v": (10, 4)}
