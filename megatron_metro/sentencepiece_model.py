"""What a SentencePiece model file says: its pieces, which of them text may become, its normaliser. Read by hand."""

from collections.abc import Container, Iterator
from typing import NamedTuple

# Numbers in SentencePiece's model file (a protocol buffer): fields of the model and of a piece, kinds of piece.
_PIECES_FIELD, _NORMALIZER_FIELD = 1, 3
_NAME_FIELD, _KIND_FIELD = 1, 3
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_VARINT, _EIGHT_BYTES, _LENGTH_DELIMITED, _FOUR_BYTES = 0, 1, 2, 5


class Piece(NamedTuple):
    """One piece of a model."""

    name: str
    is_user_symbol: bool  # SentencePiece finds these in text before anything else


def list_pieces(model: bytes) -> list[Piece]:
    """The pieces in the order of their ids; IndexError when the file is cut off."""
    return [_read_piece(model, *span) for field, *span in _fields(model, 0, len(model)) if field == _PIECES_FIELD]


def read_normalizer(model: bytes) -> str:
    """What the model calls its normaliser, such as nmt_nfkc_cf; IndexError when the file is cut off."""
    for field, start, end in _fields(model, 0, len(model)):
        if field == _NORMALIZER_FIELD:
            for part, first, last in _fields(model, start, end):
                if part == _NAME_FIELD:
                    return ascii(model[first:last].decode(errors="replace"))[1:-1]
    return "unnamed"


def reserve_pieces(model: bytes, ids: Container[int]) -> bytes:
    """The model with these pieces as control symbols: they have ids, and no text becomes them."""
    parts, token, position = [], 0, 0
    for field, start, end in _fields(model, 0, len(model)):
        header, body = model[position:start], model[start:end]
        if field == _PIECES_FIELD:
            if token in ids:
                body = _make_control(body)
                header = bytes([_PIECES_FIELD << 3 | _LENGTH_DELIMITED]) + _encode_varint(len(body))
            token += 1
        parts += [header, body]
        position = end
    return b"".join(parts)


def _read_piece(model: bytes, start: int, end: int) -> Piece:
    name, kind = b"", _NORMAL
    for field, first, last in _fields(model, start, end):
        if field == _NAME_FIELD:
            name = model[first:last]
        elif field == _KIND_FIELD:
            kind = model[first]
    return Piece(name.decode(errors="replace"), kind == _USER_DEFINED)


def _make_control(piece: bytes) -> bytes:
    kept, position = [], 0
    for field, _, end in _fields(piece, 0, len(piece)):
        if field != _KIND_FIELD:
            kept.append(piece[position:end])
        position = end
    return b"".join([*kept, bytes([_KIND_FIELD << 3 | _VARINT, _CONTROL])])


def _fields(buffer: bytes, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of each field of a protocol buffer message; IndexError when it is cut off."""
    while position < end:
        tag, start = _varint(buffer, position)
        wire_type = tag & 7
        if wire_type == _LENGTH_DELIMITED:
            length, start = _varint(buffer, start)
        elif wire_type == _VARINT:
            length = _varint(buffer, start)[1] - start
        elif wire_type in (_EIGHT_BYTES, _FOUR_BYTES):
            length = 8 if wire_type == _EIGHT_BYTES else 4
        else:
            raise IndexError(f"unknown wire type {wire_type}")
        position = start + length
        if position > end:
            raise IndexError("a field ends after its message")
        yield tag >> 3, start, position


def _varint(buffer: bytes, position: int) -> tuple[int, int]:
    """A variable-length number and the position after it."""
    value = shift = 0
    while True:
        byte = buffer[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position


def _encode_varint(value: int) -> bytes:
    encoded = []
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
