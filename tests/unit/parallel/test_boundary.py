"""What crosses a stage edge: exact round trips in every precision, gradients where they belong, never a view."""

import pytest
import torch
from torch import Tensor

from megatron_metro.config.chain import Unit
from megatron_metro.config.payload import PayloadRows, payload_rows
from megatron_metro.config.schema import ModelConfig
from megatron_metro.losses.injection import inject_loss
from megatron_metro.parallel.boundary import BoundaryPayload, pack, unpack

BATCH, SLOTS, WIDTH = 3, 10, 8
LENGTHS = {"encoder_length": 6, "decoder_length": 4, "num_masked_slots": SLOTS}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
VOCAB_SIZES = [300, 64_512, 65_536, 65_537, 250_112, 256**3]
# One boundary of every kind: hidden states alone, with ids, with ids and weights, with the encoder output too.
UNITS = [Unit("generator_layer", 0), Unit("encoder_layer", 0), Unit("encoder_head"), Unit("decoder_layer", 0)]
# What a byte-wise copy must keep and a conversion would lose: ends of the range, denormals, signed zero.
AWKWARD_WEIGHTS = [0.0, -0.0, 1.0, 1.0 - 2.0**-24, 2.0**-149, 2.0**-126, 1.17549e-38, 0.1, 1 / 3, 3e-39]


def rows_after(unit: Unit, vocab_size: int = 64_512, num_layers: int = 2) -> PayloadRows:
    model = ModelConfig(
        hidden_size=WIDTH, num_attention_heads=2, vocab_size=vocab_size, generator_num_layers=num_layers
    )
    return payload_rows(unit, model, **LENGTHS)


def random_payload(rows: PayloadRows, dtype: torch.dtype, vocab_size: int = 64_512) -> BoundaryPayload:
    """A payload with the parts that `rows` has room for; ids include the first and the last of the vocabulary."""
    ids = torch.randint(vocab_size, (BATCH, SLOTS))
    ids[0, 0], ids[0, 1] = 0, vocab_size - 1
    weights = torch.rand(BATCH, SLOTS).sigmoid()
    weights[1] = torch.tensor(AWKWARD_WEIGHTS)

    def states(count: int) -> Tensor:
        return torch.randn(count, BATCH, WIDTH).to(dtype).requires_grad_()

    return BoundaryPayload(
        hidden=states(rows.hidden),
        encoder_output=states(rows.encoder_output) if rows.encoder_output else None,
        sampled_ids=ids if rows.num_id_digits else None,
        replaced_prob=weights if rows.num_weight_digits else None,
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_round_trip_is_exact(unit: Unit, dtype: torch.dtype) -> None:
    rows = rows_after(unit)
    sent = random_payload(rows, dtype)
    message = pack(sent, rows)
    assert message.shape == (rows.total, BATCH, WIDTH)
    assert message.dtype == dtype and message.is_contiguous()
    received = unpack(message, rows, SLOTS)
    for name in ("hidden", "encoder_output", "sampled_ids", "replaced_prob"):
        before, after = getattr(sent, name), getattr(received, name)
        assert (before is None) == (after is None), name
        if before is not None:
            assert after.dtype == before.dtype and after.shape == before.shape
            assert torch.equal(bits(after), bits(before)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_every_id_arrives(vocab_size: int, dtype: torch.dtype) -> None:
    rows = rows_after(Unit("encoder_head"), vocab_size)
    assert rows.num_id_digits == (2 if vocab_size <= 65_536 else 3)
    sent = random_payload(rows, dtype, vocab_size)
    received = unpack(pack(sent, rows), rows, SLOTS)
    assert received.sampled_ids is not None and sent.sampled_ids is not None
    assert received.sampled_ids.dtype == torch.int64
    assert torch.equal(received.sampled_ids, sent.sampled_ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_gradients_go_to_the_states_and_none_to_the_aux_rows(unit: Unit, dtype: torch.dtype) -> None:
    rows = rows_after(unit)
    message = pack(random_payload(rows, dtype), rows).detach().requires_grad_()
    received = unpack(message, rows, SLOTS)
    states = [part for part in (received.hidden, received.encoder_output) if part is not None]
    upstream = [torch.randn_like(part) for part in states]
    torch.autograd.backward(states, upstream)
    assert message.grad is not None
    num_state_rows = rows.hidden + rows.encoder_output
    assert torch.equal(message.grad[:num_state_rows], torch.cat(upstream))
    assert torch.equal(message.grad[num_state_rows:], torch.zeros(rows.aux, BATCH, WIDTH, dtype=dtype))
    for discrete in (received.sampled_ids, received.replaced_prob):
        assert discrete is None or not discrete.requires_grad


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_gradients_of_a_message_reach_what_was_packed(unit: Unit) -> None:
    rows = rows_after(unit)
    payload = random_payload(rows, torch.float32)
    message = pack(payload, rows)
    gradient = torch.randn_like(message)
    message.backward(gradient)
    hidden, encoder_output, _ = gradient.split([rows.hidden, rows.encoder_output, rows.aux])
    assert payload.hidden.grad is not None and torch.equal(payload.hidden.grad, hidden)
    if payload.encoder_output is not None:
        assert payload.encoder_output.grad is not None and torch.equal(payload.encoder_output.grad, encoder_output)


@pytest.mark.parametrize("is_injected", [False, True], ids=["plain", "injected"])
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_what_leaves_is_never_a_view(unit: Unit, is_injected: bool) -> None:
    rows = rows_after(unit)
    payload = random_payload(rows, torch.float32)
    leaf, loss = payload.hidden, torch.tensor(0.0, requires_grad=True)
    hidden = leaf * 2.0
    hidden = inject_loss(hidden, loss, torch.tensor(4.0)) if is_injected else hidden[: rows.hidden]
    assert hidden._base is not None
    payload = BoundaryPayload(
        hidden=hidden,
        encoder_output=payload.encoder_output,
        sampled_ids=payload.sampled_ids,
        replaced_prob=payload.replaced_prob,
    )
    message = pack(payload, rows)
    assert message._base is None and message.requires_grad
    message.backward(torch.ones_like(message))
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.full_like(leaf, 2.0))
    if is_injected:
        assert loss.grad == 4.0


def test_freeing_a_message_leaves_what_backward_needs() -> None:
    """The schedules empty a message once it is sent; what another operation has saved of its parts must stay."""
    rows = rows_after(Unit("generator_layer", 0))
    leaf = torch.randn(rows.hidden, BATCH, WIDTH, requires_grad=True)
    hidden = leaf * 1.0
    other_reader = hidden.square().sum()  # its backward pass reads `hidden`
    message = pack(BoundaryPayload(hidden=hidden), rows)
    message.data = torch.empty(1)
    other_reader.backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, 2 * leaf)


def test_a_transposed_view_is_packed_in_the_order_of_its_rows() -> None:
    rows = rows_after(Unit("generator_layer", 0))
    hidden = torch.randn(BATCH, rows.hidden, WIDTH).transpose(0, 1).requires_grad_()
    message = pack(BoundaryPayload(hidden=hidden), rows)
    assert message.is_contiguous() and message._base is None and torch.equal(message, hidden)


def test_the_main_model_alone_sends_no_aux_rows() -> None:
    rows = rows_after(Unit("decoder_layer", 0), num_layers=0)
    payload = random_payload(rows, torch.bfloat16)
    received = unpack(pack(payload, rows), rows, 0)
    assert received.sampled_ids is None and received.replaced_prob is None
    assert received.encoder_output is not None and payload.encoder_output is not None
    assert torch.equal(received.encoder_output, payload.encoder_output)
