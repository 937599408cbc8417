"""Text to ids and back: SentencePiece with METRO's reserved ids, and ids written as text for synthetic data.

Reference sections 2 and 8.4. Training a vocabulary is in `data/vocabulary_training.py`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from megatron_metro.config.errors import ConfigError, DataError
from megatron_metro.config.schema import TokenizerConfig

MASK_PIECE = "[MASK]"
MASK_ID = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The numbers of a tokenizer that objectives need; small enough to send to every process."""

    num_pieces: int
    num_sentinels: int
    bos_id: int = 0
    pad_id: int = 1
    eos_id: int = 2
    unk_id: int = 3
    mask_id: int = MASK_ID  # reserved, and unused by METRO: its mask token is the first sentinel

    @property
    def vocab_size(self) -> int:
        """Pieces and sentinels."""
        return self.num_pieces + self.num_sentinels

    @property
    def sentinel_ids(self) -> range:
        """Ids appended after the pieces. METRO's mask token and decoder start token is the first."""
        return range(self.num_pieces, self.vocab_size)


class Tokenizer:
    """What every tokenizer offers; ids of special tokens and sentinels never come out of `encode`."""

    def __init__(self, vocabulary: Vocabulary, sha256: str) -> None:
        self.vocabulary = vocabulary
        self.sha256 = sha256  # hexadecimal, of what defines the ids of text; ties data to its tokenizer
        self.num_pieces = vocabulary.num_pieces
        self.vocab_size = vocabulary.vocab_size
        self.sentinel_ids = vocabulary.sentinel_ids
        self.bos_id = vocabulary.bos_id
        self.pad_id = vocabulary.pad_id
        self.eos_id = vocabulary.eos_id
        self.unk_id = vocabulary.unk_id
        self.mask_id = vocabulary.mask_id

    @staticmethod
    def load(path: str | Path, vocab_extra_ids: int) -> "SentencePieceTokenizer":
        """A SentencePiece model file with `vocab_extra_ids` sentinels after its pieces."""
        return SentencePieceTokenizer(path, vocab_extra_ids)

    def encode(self, text: str) -> list[int]:
        """Ids of one text; whatever it spells, no special id comes out but unk."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Ids of each text."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int], show_special: bool = False) -> str:
        """Text of ids; sentinels stay readable as <sen000>, and so do special tokens when `show_special`."""
        parts: list[str] = []
        run: list[int] = []
        hidden = () if show_special else (self.bos_id, self.pad_id, self.eos_id)
        for token in map(int, ids):
            if token > self.mask_id and token < self.num_pieces:
                run.append(token)
            elif token not in hidden:
                parts += [self._decode_pieces(run), self.piece(token)]
                run = []
        return " ".join(part for part in [*parts, self._decode_pieces(run)] if part)

    def piece(self, token: int) -> str:
        """Readable form of one id."""
        if not 0 <= token < self.vocab_size:
            raise DataError(f"id {token} is not in the vocabulary of {self.vocab_size} ids")
        if token >= self.num_pieces:
            return f"<sen{token - self.num_pieces:03d}>"
        special = {self.bos_id: "<s>", self.pad_id: "<pad>", self.eos_id: "</s>", self.unk_id: "<unk>"}
        special[self.mask_id] = MASK_PIECE
        return special[token] if token in special else self._ordinary_piece(token)

    def _decode_pieces(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _ordinary_piece(self, token: int) -> str:
        raise NotImplementedError


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model whose first five ids are <s>, pad, </s>, unk and the mask piece."""

    def __init__(self, path: str | Path, vocab_extra_ids: int) -> None:
        path = Path(path)
        try:
            model = path.read_bytes()
        except OSError as error:
            raise DataError(f"--tokenizer-model {path} cannot be read: {error.strerror}; give a .model file") from error
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(_hide_mask_piece(model))
        except (RuntimeError, IndexError) as error:
            raise DataError(
                f"--tokenizer-model {path} ({len(model)} bytes) is not a SentencePiece model; "
                "train one with tools/train_tokenizer.py"
            ) from error
        vocabulary = Vocabulary(num_pieces=self._processor.get_piece_size(), num_sentinels=vocab_extra_ids)
        super().__init__(vocabulary, hashlib.sha256(model).hexdigest())
        self._check_reserved_ids(path)

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Ids of each text, in one call that builds no Python integers."""
        return self._processor.encode(texts, out_type="numpy", num_threads=1)

    def _decode_pieces(self, ids: list[int]) -> str:
        return self._processor.decode(ids) if ids else ""

    def _ordinary_piece(self, token: int) -> str:
        return self._processor.id_to_piece(token)

    def _check_reserved_ids(self, path: Path) -> None:
        found = {
            "<s>": self._processor.bos_id(),
            "pad": self._processor.pad_id(),
            "</s>": self._processor.eos_id(),
            "unk": self._processor.unk_id(),
        }
        expected = {"<s>": self.bos_id, "pad": self.pad_id, "</s>": self.eos_id, "unk": self.unk_id}
        reserved = self.num_pieces > self.mask_id and self._processor.is_control(self.mask_id)
        if found != expected or not reserved:
            raise DataError(
                f"--tokenizer-model {path} has special ids {found} and piece {self.mask_id} "
                f"{'reserved' if reserved else 'in use'}; METRO needs {expected} and {MASK_PIECE} at {self.mask_id}: "
                "train one with tools/train_tokenizer.py"
            )


class NullTokenizer(Tokenizer):
    """Text that is ids already, separated by blanks: for benchmarks and synthetic sources."""

    def __init__(self, num_pieces: int, vocab_extra_ids: int) -> None:
        vocabulary = Vocabulary(num_pieces=num_pieces, num_sentinels=vocab_extra_ids)
        if num_pieces <= vocabulary.mask_id + 1:
            raise ConfigError(
                f"--vocab-size leaves the NullTokenizer {num_pieces} ordinary and special ids; "
                f"give more than --vocab-extra-ids + {vocabulary.mask_id + 1}"
            )
        super().__init__(vocabulary, hashlib.sha256(f"NullTokenizer {num_pieces}".encode()).hexdigest())

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """The numbers in each text; special ids and sentinels are refused."""
        return [self._parse(text) for text in texts]

    def _parse(self, text: str) -> NDArray[np.int32]:
        try:
            ids = np.array([int(word) for word in text.split()], dtype=np.int64)
        except (ValueError, OverflowError) as error:
            raise DataError(f"NullTokenizer text must be ids separated by blanks: {error}") from error
        outside = ids[(ids <= self.mask_id) | (ids >= self.num_pieces)]
        if outside.size:
            raise DataError(f"NullTokenizer id {outside[0]} is not in {self.mask_id + 1}..{self.num_pieces - 1}")
        return ids.astype(np.int32)

    def _decode_pieces(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def _ordinary_piece(self, token: int) -> str:
        return str(token)


def load_tokenizer(config: TokenizerConfig, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a run; `vocab_size` (sentinels included) sizes the NullTokenizer, and must fit any other."""
    if config.vocab_extra_ids < 1:
        raise ConfigError(
            f"--vocab-extra-ids is {config.vocab_extra_ids}; METRO's mask token is the first sentinel: give 1 or more"
        )
    if config.tokenizer_type == "NullTokenizer":
        if vocab_size is None:
            raise ConfigError("--tokenizer-type NullTokenizer needs --vocab-size (sentinels included)")
        return NullTokenizer(vocab_size - config.vocab_extra_ids, config.vocab_extra_ids)
    if config.tokenizer_model is None:
        raise ConfigError("--tokenizer-model is not given; train one with tools/train_tokenizer.py")
    if config.tokenizer_type is None and not config.tokenizer_model.endswith(".model"):
        raise ConfigError(
            f"--tokenizer-model {config.tokenizer_model} does not end in .model; "
            "add --tokenizer-type SentencePieceTokenizer if it is a SentencePiece model"
        )
    tokenizer = Tokenizer.load(config.tokenizer_model, config.vocab_extra_ids)
    if vocab_size not in (None, tokenizer.vocab_size):
        raise ConfigError(
            f"--vocab-size {vocab_size} is not the tokenizer's {tokenizer.vocab_size} (--vocab-extra-ids "
            f"{config.vocab_extra_ids} included); leave --vocab-size out (--vocab-size none undoes a preset's), or "
            "give the tokenizer the model was made for"
        )
    return tokenizer


# Numbers in SentencePiece's model file (a protocol buffer): fields of the model and of a piece, kinds of piece.
_PIECES_FIELD, _KIND_FIELD = 1, 3
_CONTROL, _USER_DEFINED = 3, 4
_VARINT, _EIGHT_BYTES, _LENGTH_DELIMITED, _FOUR_BYTES = 0, 1, 2, 5


def _hide_mask_piece(model: bytes) -> bytes:
    """The model with its mask piece as a control symbol, so that text which spells it stays ordinary text.

    The released METRO vocabularies define the piece as a user symbol, which SentencePiece would find in text.
    """
    pieces = (span for field, *span in _fields(model, 0, len(model)) if field == _PIECES_FIELD)
    mask_piece = next(islice(pieces, MASK_ID, None), None)
    if mask_piece is None:
        return model
    kinds = [start for field, start, _ in _fields(model, *mask_piece) if field == _KIND_FIELD]
    if not kinds or model[kinds[-1]] != _USER_DEFINED:
        return model
    return model[: kinds[-1]] + bytes([_CONTROL]) + model[kinds[-1] + 1 :]


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
