"""The table of pipeline messages, without processes: every send has its receive, in order, on the next rank."""

import itertools

import pytest

from megatron_metro.parallel.communicator import MessageShapes, list_messages


def payload_shape(piece: int) -> tuple[int, int, int]:
    assert piece >= 0
    return piece + 10, 2, 4


def tables(
    pp: int, vpp: int, num_microbatches: int, group_size: int, forward_only: bool = False
) -> list[MessageShapes]:
    return [
        list_messages(rank, pp, vpp, num_microbatches, group_size, payload_shape, forward_only) for rank in range(pp)
    ]


LAYOUTS = [(2, 1), (3, 1), (4, 1), (8, 1), (2, 2), (2, 4), (3, 2), (3, 4), (4, 2), (8, 3)]


@pytest.mark.parametrize(("pp", "vpp"), LAYOUTS)
def test_what_is_sent_is_what_the_neighbour_expects(pp: int, vpp: int) -> None:
    for groups, extra in itertools.product((1, 2, 3), (0, 1)):
        group_size = pp + extra
        messages = tables(pp, vpp, groups * group_size, group_size)
        for rank, here in enumerate(messages):
            following = messages[(rank + 1) % pp]
            assert here.forward_sent == following.forward_received
            assert here.backward_received == following.backward_sent


@pytest.mark.parametrize(("pp", "vpp"), LAYOUTS)
def test_every_boundary_is_crossed_once_per_microbatch_and_direction(pp: int, vpp: int) -> None:
    num_microbatches = 2 * pp
    messages = tables(pp, vpp, num_microbatches, pp)
    expected = sorted(payload_shape(piece) for piece in range(pp * vpp - 1) for _ in range(num_microbatches))
    assert sorted(shape for table in messages for shape in table.forward_sent) == expected
    assert sorted(shape for table in messages for shape in table.backward_sent) == expected


def test_order_of_the_interleaved_schedule() -> None:
    first, last = tables(pp=2, vpp=2, num_microbatches=4, group_size=2)
    # Pieces 0..3 send 10, 11, 12 rows; rank 0 holds pieces 0 and 2, rank 1 holds 1 and 3.
    assert [rows for rows, _, _ in first.forward_sent] == [10, 10, 12, 12, 10, 10, 12, 12]
    assert [rows for rows, _, _ in first.forward_received] == [11, 11, 11, 11]
    assert [rows for rows, _, _ in first.backward_received] == [12, 12, 10, 10, 12, 12, 10, 10]
    assert [rows for rows, _, _ in last.backward_sent] == [12, 12, 10, 10, 12, 12, 10, 10]
    assert [rows for rows, _, _ in last.backward_received] == [11, 11, 11, 11]


def test_validation_sends_nothing_backward() -> None:
    for table in tables(pp=3, vpp=2, num_microbatches=6, group_size=3, forward_only=True):
        assert table.backward_sent == () and table.backward_received == ()
        assert table.forward_sent or table.forward_received


def test_one_stage_sends_nothing() -> None:
    (table,) = tables(pp=1, vpp=1, num_microbatches=5, group_size=1)
    assert table == MessageShapes(forward_received=(), forward_sent=(), backward_received=(), backward_sent=())
