"""Text to ids and back: SentencePiece with METRO's reserved ids or T5's, and ids written as text for synthetic data.

Reference sections 2 and 8.4. Training a vocabulary is in `data/vocabulary_training.py`; what a model file says of its
pieces, in `sentencepiece_model.py`.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from megatron_metro.config.errors import ConfigError, DataError
from megatron_metro.config.schema import TokenizerConfig
from megatron_metro.pre_tokenizer import pre_tokenize
from megatron_metro.sentencepiece_model import Piece, list_pieces, read_normalizer, reserve_pieces

MASK_PIECE = "[MASK]"
MASK_ID = 4
SENTINEL_PIECE = re.compile(r"\u2581?<extra_id_(\d{1,6})>")
ROW_MULTIPLE = 128  # T5's models have more rows than its tokenizers have ids


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The numbers of a tokenizer that objectives need; small enough to send to every process."""

    num_pieces: int  # ids below the sentinels
    num_sentinels: int
    bos_id: int | None = 0  # None: blocks start with text
    pad_id: int = 1
    eos_id: int = 2
    unk_id: int = 3
    mask_id: int | None = MASK_ID  # reserved, and unused by METRO: its mask token is the first sentinel
    is_t5: bool = False  # whose decoder starts with pad and whose spans begin with the first sentinel
    sentinels_descend: bool = False  # the first sentinel is the last id of the vocabulary

    @staticmethod
    def t5(num_pieces: int, num_sentinels: int, *, sentinels_descend: bool = True) -> "Vocabulary":
        """T5's ids: pad 0, </s> 1, unk 2, neither <s> nor mask piece, sentinels down from the last id."""
        return Vocabulary(
            num_pieces=num_pieces,
            num_sentinels=num_sentinels,
            bos_id=None,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            mask_id=None,
            is_t5=True,
            sentinels_descend=sentinels_descend,
        )

    @property
    def vocab_size(self) -> int:
        """Pieces and sentinels."""
        return self.num_pieces + self.num_sentinels

    @property
    def sentinel_ids(self) -> range:
        """The sentinels, first to last, which stand after the pieces; METRO counts up and T5 down."""
        ids = range(self.num_pieces, self.vocab_size)
        return ids[::-1] if self.sentinels_descend else ids

    @property
    def span_sentinel_ids(self) -> range:
        """What marks corrupted spans, in order; METRO's first sentinel has other uses."""
        return self.sentinel_ids if self.is_t5 else self.sentinel_ids[1:]

    @property
    def decoder_start_id(self) -> int:
        """What the decoder reads first: T5's pad, METRO's first sentinel."""
        return self.pad_id if self.is_t5 else self.sentinel_ids[0]

    @property
    def writing_start_id(self) -> int:
        """What the decoder reads first in fine-tuning and generation: T5's pad, METRO's </s> (reference section 6)."""
        return self.pad_id if self.is_t5 else self.eos_id

    @property
    def masked_id(self) -> int:
        """What stands where a single token is masked: METRO's first sentinel; T5 has no mask token, its last serves."""
        return self.sentinel_ids[-1 if self.is_t5 else 0]

    @property
    def special_ids(self) -> dict[int, str]:
        """Ids that are no text, and their names."""
        named = {self.bos_id: "<s>", self.pad_id: "<pad>", self.eos_id: "</s>", self.unk_id: "<unk>"}
        named[self.mask_id] = MASK_PIECE
        return {token: name for token, name in named.items() if token is not None}

    @property
    def first_text_id(self) -> int:
        """The lowest id of an ordinary piece."""
        return len(self.special_ids)

    @property
    def random_ids(self) -> range:
        """Ids that may stand for a masked token: all but the special ones, METRO's mask piece included."""
        return range(self.first_text_id if self.mask_id is None else self.mask_id, self.vocab_size)

    def frame(self, ids: Sequence[int], *, is_source: bool) -> list[int]:
        """A text as fine-tuning and generation read it: <s>, if there is one, before a source; </s> after both."""
        start = [] if self.bos_id is None or not is_source else [self.bos_id]
        return [*start, *ids, self.eos_id]


class Tokenizer:
    """What every tokenizer offers; ids of special tokens and sentinels never come out of `encode`."""

    def __init__(
        self, vocabulary: Vocabulary, sha256: str, *, normalizer: str = "none", pre_tokenizer: str = "none"
    ) -> None:
        self.vocabulary = vocabulary
        self.sha256 = sha256  # hexadecimal, of what defines the ids of text; ties data to its tokenizer
        # Part of what the checksum covers; recorded beside it for people.
        self.normalizer, self.pre_tokenizer = normalizer, pre_tokenizer
        self.num_pieces = vocabulary.num_pieces
        self.vocab_size = vocabulary.vocab_size
        self.sentinel_ids = vocabulary.sentinel_ids
        self.bos_id = vocabulary.bos_id
        self.pad_id = vocabulary.pad_id
        self.eos_id = vocabulary.eos_id
        self.unk_id = vocabulary.unk_id
        self.mask_id = vocabulary.mask_id
        self.special_ids = vocabulary.special_ids
        self.first_text_id = vocabulary.first_text_id

    @staticmethod
    def load(path: str | Path, vocab_extra_ids: int, pre_tokenizer: str = "none") -> "SentencePieceTokenizer":
        """A SentencePiece model file with `vocab_extra_ids` sentinels, after its pieces or the last of them.

        `pre_tokenizer` is a choice of --pre-tokenizer.
        """
        return SentencePieceTokenizer(path, vocab_extra_ids, pre_tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of one text; whatever it spells, no special id comes out but unk."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Ids of each text."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int], show_special: bool = False) -> str:
        """Text of ids; sentinels stay readable, as <sen000>, and so do special tokens when `show_special`."""
        parts: list[str] = []
        run: list[int] = []
        hidden = () if show_special else (self.bos_id, self.pad_id, self.eos_id)
        for token in map(int, ids):
            if self.first_text_id <= token < self.num_pieces:
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
            number = self.sentinel_ids.index(token)
            return f"<extra_id_{number}>" if self.vocabulary.is_t5 else f"<sen{number:03d}>"
        return self.special_ids[token] if token in self.special_ids else self._ordinary_piece(token)

    def _decode_pieces(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _ordinary_piece(self, token: int) -> str:
        raise NotImplementedError


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with METRO's first five ids (<s>, pad, </s>, unk, mask) or T5's three (pad, </s>, unk)."""

    def __init__(self, path: str | Path, vocab_extra_ids: int, pre_tokenizer: str = "none") -> None:
        path = Path(path)
        try:
            model = path.read_bytes()
        except OSError as error:
            raise DataError(f"--tokenizer-model {path} cannot be read: {error.strerror}; give a .model file") from error
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            pieces = list_pieces(model)
            sentinels = _find_sentinel_pieces(pieces)
            # The released METRO vocabularies define the mask piece as a user symbol. As control symbols it and the
            # sentinels keep their ids, and text which spells them stays ordinary text.
            reserved = {i for i, piece in enumerate(pieces) if i in sentinels or piece == (MASK_PIECE, True)}
            self._processor.LoadFromSerializedProto(reserve_pieces(model, reserved))
        except (RuntimeError, IndexError) as error:
            raise DataError(
                f"--tokenizer-model {path} ({len(model)} bytes) is not a SentencePiece model; "
                "train one with tools/train_tokenizer.py"
            ) from error
        vocabulary = _describe_model(self._processor, path, vocab_extra_ids)
        if sentinels:
            vocabulary = _use_sentinel_pieces(vocabulary, sentinels, path)
        normalizer = read_normalizer(model)
        super().__init__(vocabulary, _hash(model, pre_tokenizer), normalizer=normalizer, pre_tokenizer=pre_tokenizer)
        self.model = model  # the file, as it is

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Ids of each text, in one call that builds no Python integers."""
        if self.pre_tokenizer != "none":
            texts = [pre_tokenize(text, lowers=self.pre_tokenizer == "metro-lower") for text in texts]
        return self._processor.encode(texts, out_type="numpy", num_threads=1)

    def _decode_pieces(self, ids: list[int]) -> str:
        return self._processor.decode(ids) if ids else ""

    def _ordinary_piece(self, token: int) -> str:
        return self.name_piece(token)

    def name_piece(self, token: int) -> str:
        """What the model calls one of its pieces."""
        return str(self._processor.id_to_piece(token))


def _hash(model: bytes, pre_tokenizer: str) -> str:
    """What defines the ids of text: the model, which holds its normaliser, and what comes before it."""
    digest = hashlib.sha256(model).hexdigest()
    return digest if pre_tokenizer == "none" else hashlib.sha256(f"{pre_tokenizer} {digest}".encode()).hexdigest()


def _describe_model(processor: sentencepiece.SentencePieceProcessor, path: Path, num_sentinels: int) -> Vocabulary:
    """METRO's vocabulary or T5's, by the special ids of a model; DataError for any other."""
    num_pieces = processor.get_piece_size()
    metro, t5 = (make(num_pieces=num_pieces, num_sentinels=num_sentinels) for make in (Vocabulary, Vocabulary.t5))
    found = {
        "<s>": processor.bos_id(),
        "pad": processor.pad_id(),
        "</s>": processor.eos_id(),
        "unk": processor.unk_id(),
    }
    if found == _name_ids(t5):
        return t5
    reserved = num_pieces > MASK_ID and processor.is_control(MASK_ID)
    if found != _name_ids(metro) or not reserved:
        raise DataError(
            f"--tokenizer-model {path} has special ids {found} and piece {MASK_ID} "
            f"{'reserved' if reserved else 'in use'}; METRO needs {_name_ids(metro)} and {MASK_PIECE} at {MASK_ID}, T5 "
            f"{_name_ids(t5)}: train one with tools/train_tokenizer.py"
        )
    return metro


def _name_ids(vocabulary: Vocabulary) -> dict[str, int]:
    """Special ids as SentencePiece gives them, -1 where there is none."""
    bos_id = -1 if vocabulary.bos_id is None else vocabulary.bos_id
    return {"<s>": bos_id, "pad": vocabulary.pad_id, "</s>": vocabulary.eos_id, "unk": vocabulary.unk_id}


def _find_sentinel_pieces(pieces: Sequence[Piece]) -> dict[int, int]:
    """Ids of the pieces <extra_id_0>, <extra_id_1> ... and their numbers."""
    names = (SENTINEL_PIECE.fullmatch(piece.name) for piece in pieces)
    return {token: int(name[1]) for token, name in enumerate(names) if name}


def _use_sentinel_pieces(vocabulary: Vocabulary, numbers: Mapping[int, int], path: Path) -> Vocabulary:
    """The vocabulary of a model whose last pieces are its sentinels: none are appended."""
    ids = range(vocabulary.num_pieces - len(numbers), vocabulary.num_pieces)
    rising = range(len(numbers))
    found = [numbers.get(token) for token in ids]
    if not vocabulary.is_t5 or found not in (list(rising), list(rising[::-1])):
        raise DataError(
            f"--tokenizer-model {path} has {len(numbers)} sentinel pieces <extra_id_0> ...; they must be the last ids "
            "of a model with T5's special ids, numbered without gaps"
        )
    if vocabulary.num_sentinels != len(numbers):
        raise ConfigError(
            f"--vocab-extra-ids is {vocabulary.num_sentinels}, --tokenizer-model {path} holds {len(numbers)} sentinels "
            f"itself; give {len(numbers)}"
        )
    return replace(vocabulary, num_pieces=ids.start, sentinels_descend=found[0] != 0)


class NullTokenizer(Tokenizer):
    """Text that is ids already, separated by blanks: for benchmarks and synthetic sources."""

    def __init__(self, num_pieces: int, vocab_extra_ids: int) -> None:
        vocabulary = Vocabulary(num_pieces=num_pieces, num_sentinels=vocab_extra_ids)
        if num_pieces <= vocabulary.first_text_id:
            raise ConfigError(
                f"--vocab-size leaves the NullTokenizer {num_pieces} ordinary and special ids; "
                f"give more than --vocab-extra-ids + {vocabulary.first_text_id}"
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
        outside = ids[(ids < self.first_text_id) | (ids >= self.num_pieces)]
        if outside.size:
            raise DataError(f"NullTokenizer id {outside[0]} is not in {self.first_text_id}..{self.num_pieces - 1}")
        return ids.astype(np.int32)

    def _decode_pieces(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def _ordinary_piece(self, token: int) -> str:
        return str(token)


def load_tokenizer(config: TokenizerConfig, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a run; `vocab_size` (sentinels included) sizes the NullTokenizer, and must fit any other.

    A T5 tokenizer also fits a matrix padded to a multiple of 128 rows: 32,100 ids and 32,128 rows in the released ones.
    """
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
    tokenizer = Tokenizer.load(config.tokenizer_model, config.vocab_extra_ids, config.pre_tokenizer)
    fitting: list[int | None] = [None, tokenizer.vocab_size]
    if tokenizer.vocabulary.is_t5:
        fitting.append(-(-tokenizer.vocab_size // ROW_MULTIPLE) * ROW_MULTIPLE)
    if vocab_size not in fitting:
        raise ConfigError(
            f"--vocab-size {vocab_size} is not the tokenizer's {tokenizer.vocab_size} (--vocab-extra-ids "
            f"{config.vocab_extra_ids} included); leave --vocab-size out (--vocab-size none undoes a preset's), or "
            "give the tokenizer the model was made for"
        )
    return tokenizer
