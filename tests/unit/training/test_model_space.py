"""Flat ranges of row-major tensors as boxes."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_metro.training.model_space import row_major_boxes


@given(st.data())
def test_boxes_cover_a_range_exactly_once_and_in_order(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    flat = torch.arange(numel)
    rebuilt = torch.full(shape, -1)
    boxes = list(row_major_boxes(shape, start, stop))
    for offset, size, begin in boxes:
        part = flat[begin : begin + math.prod(size)].view(size)
        region = rebuilt[tuple(slice(a, a + b) for a, b in zip(offset, size))]
        assert region.shape == part.shape
        assert (region == -1).all()
        region.copy_(part)
    expected = torch.where((flat >= start) & (flat < stop), flat, -1).view(shape)
    assert torch.equal(rebuilt, expected)
    assert len(boxes) <= 2 * len(shape) - 1
    if (start, stop) == (0, numel):
        assert len(boxes) == 1


def test_scalar_and_empty_ranges():
    assert list(row_major_boxes((), 0, 1)) == [((), (), 0)]
    assert list(row_major_boxes((3, 4), 5, 5)) == []
