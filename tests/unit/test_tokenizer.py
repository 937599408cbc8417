"""Reserved ids, sentinels, and text that spells special tokens."""

import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_metro.config.errors import ConfigError, DataError
from megatron_metro.config.schema import TokenizerConfig
from megatron_metro.data.vocabulary_training import VocabularyOptions, train_vocabulary, write_vocabulary
from megatron_metro.tokenizer import NullTokenizer, SentencePieceTokenizer, Tokenizer, Vocabulary, load_tokenizer

GENERATOR = random.Random(3)
WORDS = ["".join(GENERATOR.choices("abcdefghijklmnop", k=GENERATOR.randint(2, 7))) for _ in range(200)]
TEXT = [" ".join(GENERATOR.choices(WORDS, k=20)) for _ in range(100)] + [
    "the quick brown fox jumps over the lazy dog <s> </s> [MASK] <pad> <unk> <sen000> [CLS] [SEP]",
    "pack my box with five dozen liquor jugs, 0123456789 (and more) A K M S / [ ]",
]
SPELLINGS = ["<s>", "</s>", "<pad>", "<unk>", "[MASK]", "<sen000>", "<sen001>", "[CLS]", "[SEP]", "▁[MASK]", "a[MASK]b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n".join(TEXT))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    model = train_vocabulary(VocabularyOptions(inputs=(str(folder / "text.txt"),), vocab_size=150))
    path, num_pieces = write_vocabulary(model, str(folder / "own"))
    assert num_pieces == 150
    return Tokenizer.load(path, 16)


def test_ids(tokenizer):
    special = (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id)
    assert special == (0, 1, 2, 3, 4)
    assert (tokenizer.num_pieces, tokenizer.vocab_size, tokenizer.sentinel_ids) == (150, 166, range(150, 166))
    assert [tokenizer.piece(i) for i in (0, 1, 2, 3, 4, 150, 165)] == [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "[MASK]",
        "<sen000>",
        "<sen015>",
    ]
    with pytest.raises(DataError, match="166"):
        tokenizer.piece(166)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_special_tokens_in_text_stay_text(tokenizer, spelling):
    ids = tokenizer.encode(f"{spelling} the fox {spelling}")
    assert not {0, 1, 2, 4} & set(ids)
    assert max(ids) < tokenizer.num_pieces
    assert tokenizer.decode(ids) == f"{spelling} the fox {spelling}".replace("▁", "")


@given(text=st.lists(st.sampled_from([*SPELLINGS, " ", "the", "\n", "\0", "ä", "☃"]), max_size=12).map("".join))
@settings(max_examples=100, deadline=None)
def test_no_text_gives_a_special_id(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not {0, 1, 2, 4} & set(ids)
    assert max(ids, default=0) < tokenizer.num_pieces


def test_decode_shows_sentinels(tokenizer):
    ids = [0, *tokenizer.encode("the fox"), 150, *tokenizer.encode("jumps"), 2, 1]
    assert tokenizer.decode(ids) == "the fox <sen000> jumps"
    assert tokenizer.decode(ids, show_special=True) == "<s> the fox <sen000> jumps </s> <pad>"


def test_a_user_defined_mask_piece_is_hidden(folder):
    """The released METRO vocabularies have [MASK] as a user symbol and other names for the special pieces."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(folder / "released"),
        vocab_size=150,
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        bos_piece="[CLS]",
        pad_piece="[PAD]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
        user_defined_symbols=["[MASK]"],
        minloglevel=2,
    )
    raw = sentencepiece.SentencePieceProcessor(model_file=str(folder / "released.model"))
    assert 4 in raw.encode("a [MASK] b")
    tokenizer = Tokenizer.load(folder / "released.model", 16)
    assert 4 not in tokenizer.encode("a [MASK] b")
    assert tokenizer.encode("the lazy dog") == raw.encode("the lazy dog")


def add_pieces(model: bytes, names: list[str], kind: int = 4) -> bytes:
    """A model file with more pieces, as a protocol buffer lets one append them; kind 4 is a user symbol."""
    for name in map(str.encode, names):
        body = bytes([0x0A, len(name)]) + name + bytes([0x15, 0, 0, 0, 0]) + (bytes([0x18, kind]) if kind else b"")
        model += bytes([0x0A, len(body)]) + body
    return model


@pytest.fixture(scope="module")
def t5_model(folder) -> bytes:
    return train_vocabulary(VocabularyOptions(inputs=(str(folder / "text.txt"),), vocab_size=150, is_t5=True))


def load_bytes(folder, model: bytes, num_sentinels: int) -> Tokenizer:
    (folder / "given.model").write_bytes(model)
    return Tokenizer.load(folder / "given.model", num_sentinels)


def test_t5_ids(folder, t5_model):
    """Pad 0, </s> 1, unk 2; appended sentinels count down from the last id."""
    tokenizer = load_bytes(folder, t5_model, 16)
    vocabulary = tokenizer.vocabulary
    assert vocabulary == Vocabulary.t5(150, 16)
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.bos_id) == (0, 1, 2, None)
    assert list(vocabulary.sentinel_ids) == list(range(165, 149, -1))
    assert (vocabulary.decoder_start_id, vocabulary.span_sentinel_ids[0], vocabulary.masked_id) == (0, 165, 150)
    assert (vocabulary.first_text_id, vocabulary.random_ids) == (3, range(3, 166))
    assert [tokenizer.piece(i) for i in (0, 1, 2, 150, 165)] == [
        "<pad>",
        "</s>",
        "<unk>",
        "<extra_id_15>",
        "<extra_id_0>",
    ]
    text = "the lazy dog"
    assert min(tokenizer.encode(text)) >= 3
    assert tokenizer.decode([*tokenizer.encode(text), 165, 1, 0]) == f"{text} <extra_id_0>"
    assert tokenizer.decode([*tokenizer.encode(text), 1], show_special=True) == f"{text} </s>"


def test_metros_ids_beside_t5s():
    vocabulary = Vocabulary(num_pieces=150, num_sentinels=16)
    assert (vocabulary.decoder_start_id, vocabulary.span_sentinel_ids, vocabulary.masked_id) == (
        150,
        range(151, 166),
        150,
    )
    assert (vocabulary.first_text_id, vocabulary.random_ids) == (5, range(4, 166))


@pytest.mark.parametrize("kind", [0, 4])
@pytest.mark.parametrize("prefix", ["", "▁"])
@pytest.mark.parametrize("descend", [False, True])
def test_sentinels_that_are_pieces(folder, t5_model, kind, prefix, descend):
    numbers = range(8)[:: -1 if descend else 1]
    model = add_pieces(t5_model, [f"{prefix}<extra_id_{i}>" for i in numbers], kind)
    tokenizer = load_bytes(folder, model, 8)
    assert (tokenizer.num_pieces, tokenizer.vocab_size) == (150, 158)
    assert list(tokenizer.sentinel_ids) == list(range(150, 158))[:: -1 if descend else 1]
    assert tokenizer.piece(150) == ("<extra_id_7>" if descend else "<extra_id_0>")
    assert max(tokenizer.encode("the <extra_id_0> fox<extra_id_3>")) < 150
    assert tokenizer.encode("lazy dog") == load_bytes(folder, t5_model, 8).encode("lazy dog")
    with pytest.raises(ConfigError, match=r"--vocab-extra-ids is 100, .* holds 8 sentinels itself; give 8"):
        load_bytes(folder, model, 100)


def test_sentinel_pieces_must_be_the_last_ids(folder, t5_model, tokenizer):
    metro_model = (folder / "own.model").read_bytes()
    for model in (
        add_pieces(t5_model, ["<extra_id_0>", "more"]),
        add_pieces(t5_model, ["<extra_id_0>", "<extra_id_2>"]),
        add_pieces(metro_model, ["<extra_id_0>", "<extra_id_1>"]),
    ):
        with pytest.raises(DataError, match=r"sentinel pieces .* must be the last ids"):
            load_bytes(folder, model, 2)


def test_t5_models_may_have_padded_rows(folder, t5_model):
    (folder / "t5.model").write_bytes(t5_model)
    config = TokenizerConfig(tokenizer_model=str(folder / "t5.model"), vocab_extra_ids=100)
    for rows in (None, 250, 256):
        assert load_tokenizer(config, rows).sentinel_ids[0] == 249
    with pytest.raises(ConfigError, match="--vocab-size 384"):
        load_tokenizer(config, 384)


def test_models_that_do_not_fit_are_refused(folder, tokenizer):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(folder / "plain"), vocab_size=120, minloglevel=2
    )
    with pytest.raises(DataError, match="special ids"):
        Tokenizer.load(folder / "plain.model", 16)
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(folder / "absent.model", 16)
    model = (folder / "own.model").read_bytes()
    for name, content in (("empty", b""), ("text", b"hello"), ("half", model[: len(model) // 2])):
        (folder / f"{name}.model").write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.model"):
            Tokenizer.load(folder / f"{name}.model", 16)


def test_training_is_deterministic_and_names_the_largest_vocabulary(folder):
    inputs = (str(folder / "text.txt"),)
    options = VocabularyOptions(inputs=inputs, vocab_size=150)
    assert train_vocabulary(options) == train_vocabulary(options)
    with pytest.raises(ConfigError, match=r"--vocab-size 5000 is too large for this text; the largest possible is \d+"):
        train_vocabulary(VocabularyOptions(inputs=inputs, vocab_size=5000))
    with pytest.raises(ConfigError, match=r"--vocab-size 10 is too small; .* need \d+"):
        train_vocabulary(VocabularyOptions(inputs=inputs, vocab_size=10))
    model = train_vocabulary(VocabularyOptions(inputs=inputs, vocab_size=5000, allow_smaller_vocab=True))
    assert 60 < write_vocabulary(model, str(folder / "small"))[1] < 5000


def test_long_lines_are_learned_from(folder):
    (folder / "long.txt").write_text("alpha beta gamma " * 3000 + "x" * 5000)
    options = VocabularyOptions(inputs=(str(folder / "long.txt"),), vocab_size=30, allow_smaller_vocab=True)
    path, _ = write_vocabulary(train_vocabulary(options), str(folder / "long"))
    assert Tokenizer.load(path, 1).unk_id not in Tokenizer.load(path, 1).encode("alpha beta gamma x")


def test_null_tokenizer():
    tokenizer = load_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_extra_ids=10), vocab_size=110)
    assert (tokenizer.num_pieces, tokenizer.sentinel_ids) == (100, range(100, 110))
    assert tokenizer.encode("5 99 7") == [5, 99, 7]
    assert tokenizer.encode_batch(["5", ""])[1].dtype == np.int32
    assert tokenizer.decode([0, 5, 99, 100, 2]) == "5 99 <sen000>"
    for text in ("4", "100", "-1", "x", str(2**70)):
        with pytest.raises(DataError):
            tokenizer.encode(text)
    assert NullTokenizer(100, 10).sha256 != NullTokenizer(101, 10).sha256


def test_load_tokenizer_checks_flags(folder, tokenizer):
    model = str(folder / "own.model")
    assert isinstance(load_tokenizer(TokenizerConfig(tokenizer_model=model)), SentencePieceTokenizer)
    for config, message in (
        (TokenizerConfig(), "--tokenizer-model"),
        (TokenizerConfig(tokenizer_model="vocab.txt"), "does not end in .model"),
        (TokenizerConfig(tokenizer_type="NullTokenizer"), "--vocab-size"),
        (TokenizerConfig(tokenizer_model=model, vocab_extra_ids=0), "--vocab-extra-ids is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_tokenizer(config)
    fitting = TokenizerConfig(tokenizer_model=model, vocab_extra_ids=16)
    assert load_tokenizer(fitting, 166).vocab_size == 166
    with pytest.raises(ConfigError, match=r"--vocab-size 160 is not the tokenizer's 166 \(--vocab-extra-ids 16"):
        load_tokenizer(fitting, 160)
