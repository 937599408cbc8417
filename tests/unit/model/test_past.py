"""What a decoder keeps: nothing is lost when it grows, and rows follow their beams."""

import torch

from megatron_metro.model.past import LayerPast, OwnPast, SourcePast, WritingState

NUM_ROWS, SHAPE = 3, (3, 2, 5)


def draw(length: int, seed: int) -> torch.Tensor:
    return torch.randn(length, *SHAPE, generator=torch.Generator().manual_seed(seed))


def test_positions_are_kept_in_order_beyond_every_capacity() -> None:
    past, keys, values = OwnPast(), draw(150, 1), draw(150, 2)
    start = 0
    for length in (7, 1, 1, 40, 1, 99, 1):
        part = slice(start, start + length)
        key, value = past.append(keys[part], values[part])
        start += length
        assert torch.equal(key, keys[:start]) and torch.equal(value, values[:start]) and past.length == start


def test_rows_follow_what_is_taken() -> None:
    own = OwnPast()
    state = WritingState(source_mask=None, layers={4: LayerPast(source=SourcePast(draw(2, 3), draw(2, 4)), own=own)})
    keys, values = draw(5, 5), draw(5, 6)
    own.append(keys, values)
    order = torch.tensor([2, 0, 0])
    state.take(torch.arange(NUM_ROWS))
    state.take(order)
    more = draw(1, 7)
    key, value = own.append(more, more)
    assert torch.equal(key, torch.cat([keys[:, order], more])) and torch.equal(value[:5], values[:, order])
