"""METRO batches and T5 spans: statistics of 10,000 blocks, reconstruction, and rows that stand alone."""

import hashlib
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_metro.batch import Microbatch
from megatron_metro.config.errors import ConfigError
from megatron_metro.config.schema import DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from megatron_metro.config.spans import span_lengths
from megatron_metro.data.blocks import Blocks
from megatron_metro.data.metro_objective import MetroObjective
from megatron_metro.data.objectives import build_objective
from megatron_metro.data.randomness import BlockKeys
from megatron_metro.data.span_objective import build_span_objective
from megatron_metro.tokenizer import Vocabulary

VOCABULARY = Vocabulary(num_pieces=1000, num_sentinels=100)
SENTINEL = VOCABULARY.sentinel_ids[0]


def make_blocks(num_blocks: int, length: int, lengths: list[int] | None = None, seed: int = 3) -> Blocks:
    generator = np.random.Generator(np.random.PCG64(seed))
    tokens = generator.integers(5, 1000, (num_blocks, length))
    tokens[:, 0] = VOCABULARY.bos_id
    used = np.full(num_blocks, length) if lengths is None else np.array(lengths)
    tokens[np.arange(length) >= used[:, None]] = VOCABULARY.pad_id
    keys = BlockKeys(
        seed=seed,
        identity=np.full(num_blocks, 5, np.uint64),
        epoch=np.zeros(num_blocks, np.int64),
        block=np.arange(num_blocks),
    )
    return Blocks(tokens=tokens, lengths=used, keys=keys)


def assert_equal(first: Microbatch, second: Microbatch) -> None:
    for field in fields(Microbatch):
        values = getattr(first, field.name), getattr(second, field.name)
        assert (values[0] is None and values[1] is None) or torch.equal(*values), field.name


@pytest.fixture(scope="module")
def metro_batch() -> tuple[Blocks, Microbatch]:
    blocks = make_blocks(10_000, 512)
    return blocks, MetroObjective(vocabulary=VOCABULARY, sequence_length=512).make_batch(blocks)


def test_metro_counts_are_76_or_77_of_512(metro_batch):
    counts = metro_batch[1].masked_valid.sum(dim=1)
    assert set(counts.tolist()) == {76, 77}
    # 0.15 x 512 = 76.8, so four of five blocks have 77.
    assert abs((counts == 77).double().mean().item() - 0.8) < 5 * np.sqrt(0.16 / 10_000)


def test_metro_replacement_shares(metro_batch):
    """Reference section 3.2, up to a random id that happens to be the original: 80 / 10 / 10."""
    _, batch = metro_batch
    valid = batch.masked_valid
    seen = batch.generator_tokens.gather(1, batch.masked_slots.clamp(max=511))[valid]
    original = batch.masked_ids[valid]
    total = len(seen)
    same_by_chance = 0.1 / (VOCABULARY.vocab_size - 4)
    for found, share in (
        ((seen == SENTINEL) & (original != SENTINEL), 0.8 + same_by_chance),
        (seen == original, 0.1 + same_by_chance),
        ((seen != SENTINEL) & (seen != original), 0.1 - 2 * same_by_chance),
    ):
        assert abs(found.double().mean().item() - share) < 5 * np.sqrt(share * (1 - share) / total)


def test_metro_random_ids_are_uniform_from_4(metro_batch):
    _, batch = metro_batch
    valid = batch.masked_valid
    seen = batch.generator_tokens.gather(1, batch.masked_slots.clamp(max=511))[valid]
    random = seen[(seen != batch.masked_ids[valid]) & (seen != SENTINEL)]
    assert random.min() == 4
    assert random.max() == VOCABULARY.vocab_size - 1
    counts = torch.bincount(random, minlength=VOCABULARY.vocab_size)[4:].double()
    counts = counts[torch.arange(4, VOCABULARY.vocab_size) != SENTINEL]
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
    freedom = len(counts) - 1
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_metro_positions_are_uniform_and_include_bos(metro_batch):
    _, batch = metro_batch
    counts = torch.bincount(batch.masked_slots[batch.masked_valid], minlength=512).double()
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
    assert chi_square < 511 + 5 * np.sqrt(2 * 511)


def test_metro_tensors(metro_batch):
    blocks, batch = metro_batch
    tokens = torch.from_numpy(blocks.tokens)
    assert torch.equal(batch.encoder_tokens, tokens)
    assert (batch.decoder_tokens[:, 0] == SENTINEL).all()
    assert torch.equal(batch.decoder_tokens[:, 1:], tokens[:, :-1])
    assert batch.masked_slots.shape == (10_000, 80)
    assert (batch.masked_slots[~batch.masked_valid] == 512).all()
    assert (batch.uniforms[~batch.masked_valid] == 0).all()
    assert batch.uniforms.dtype == torch.float64
    assert (batch.masked_slots.diff(dim=1)[batch.masked_valid[:, 1:]] > 0).all()
    assert torch.equal(
        batch.masked_ids[batch.masked_valid], tokens.gather(1, batch.masked_slots.clamp(max=511))[batch.masked_valid]
    )
    untouched = torch.ones(10_000, 513, dtype=torch.bool).scatter_(1, batch.masked_slots, False)[:, :512]
    assert torch.equal(batch.generator_tokens[untouched], tokens[untouched])
    for name in ("slots", "ids", "valid"):
        assert torch.equal(getattr(batch, f"masked_{name}"), getattr(batch, f"target_{name}"))
    assert batch.encoder_padding is None


def test_metro_uniforms_belong_to_positions():
    """Another masking rate keeps the uniform of each position that is masked under both."""
    blocks = make_blocks(8, 64)
    low, high = (
        MetroObjective(vocabulary=VOCABULARY, sequence_length=64, mask_prob=p).make_batch(blocks) for p in (0.2, 0.5)
    )
    for row in range(8):
        found = {
            slot.item(): uniform.item()
            for slot, uniform, valid in zip(high.masked_slots[row], high.uniforms[row], high.masked_valid[row])
            if valid
        }
        for slot, uniform, valid in zip(low.masked_slots[row], low.uniforms[row], low.masked_valid[row]):
            if valid:
                assert found[slot.item()] == uniform.item()


@given(
    length=st.integers(1, 90),
    mask_prob=st.floats(0.01, 0.99),
    mask_special=st.booleans(),
    is_padded=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_metro_rows_stand_alone(length, mask_prob, mask_special, is_padded, data):
    lengths = data.draw(st.lists(st.integers(1, length), min_size=5, max_size=5)) if is_padded else None
    blocks = make_blocks(5, length, lengths)
    objective = MetroObjective(
        vocabulary=VOCABULARY,
        sequence_length=length,
        mask_prob=mask_prob,
        mask_special_tokens=mask_special,
        is_padded=is_padded,
    )
    batch = objective.make_batch(blocks)
    assert batch.shape == objective.shape(5)
    alone = objective.make_batch(blocks.rows(3, 4))
    for field in fields(Microbatch):
        value = getattr(batch, field.name)
        assert value is None or torch.equal(value[3:4], getattr(alone, field.name)), field.name
    slots = batch.masked_slots[batch.masked_valid]
    row_lengths = torch.from_numpy(blocks.lengths).repeat_interleave(batch.masked_valid.sum(dim=1))
    assert (slots < row_lengths).all()
    if not mask_special:
        assert (batch.masked_ids[batch.masked_valid] != VOCABULARY.bos_id).all()
    counts = batch.masked_valid.sum(dim=1).numpy()
    assert (counts <= np.ceil(mask_prob * blocks.lengths + 1e-9)).all()
    if mask_special:
        assert (counts >= np.floor(mask_prob * blocks.lengths)).all()
    if is_padded:
        assert torch.equal(batch.encoder_padding, batch.encoder_tokens == VOCABULARY.pad_id)
        assert (batch.decoder_tokens[batch.decoder_padding] == VOCABULARY.pad_id).all()


@pytest.mark.parametrize("vocabulary", [VOCABULARY, Vocabulary.t5(1000, 100)], ids=["metro", "t5"])
def test_t5_spans_of_10_000_blocks(vocabulary, record_property):
    objective = build_span_objective(span_lengths(512, 0.15, 3.0), 512, vocabulary)
    assert objective.raw_length == 568
    blocks = make_blocks(10_000, 568)
    batch = objective.make_batch(blocks)
    assert batch.shape == objective.shape(10_000)
    assert batch.encoder_tokens.shape == (10_000, 512)
    assert batch.decoder_tokens.shape == (10_000, 114)
    in_encoder = batch.encoder_tokens >= 1000
    in_target = batch.target_ids >= 1000
    # METRO counts up behind <sen000>, T5 down from the last id.
    sentinels = range(1099, 1071, -1) if vocabulary.is_t5 else range(1001, 1029)
    expected = torch.tensor(sentinels).repeat(10_000)
    for tokens, found in ((batch.encoder_tokens, in_encoder), (batch.target_ids, in_target)):
        assert (found.sum(dim=1) == 28).all()
        assert torch.equal(tokens[found], expected)
        assert (tokens[:, -1] == vocabulary.eos_id).all()
    assert ((~in_target).sum(dim=1) == 86).all()
    assert (batch.decoder_tokens[:, 0] == (0 if vocabulary.is_t5 else 1000)).all()
    assert torch.equal(batch.decoder_tokens[:, 1:], batch.target_ids[:, :-1])
    counts = torch.from_numpy(np.bincount(span_starts(batch), minlength=568))[1:].double()
    inner = counts[20:-20]  # the first token is never noise and the last always is, which shows near both ends
    p_value = chi_square_p(inner)
    record_property("p of uniform span starts", round(p_value, 4))
    assert p_value > 1e-4


def chi_square_p(counts: torch.Tensor) -> float:
    """Probability of counts at least as uneven if all are equally likely."""
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2).item()


def span_starts(batch: Microbatch) -> np.ndarray:
    """Positions in the raw text of all span starts, found from the two sides alone."""
    rows, columns = np.nonzero(batch.encoder_tokens.numpy() >= 1000)
    target_columns = np.nonzero(batch.target_ids.numpy() >= 1000)[1]
    # The i-th sentinel stands after i sentinels on both sides, and noise left of it is missing in the encoder.
    index = np.arange(len(rows)) % 28
    return (columns - index) + (target_columns - index)


@given(
    encoder_length=st.integers(8, 120),
    mask_prob=st.floats(0.05, 0.5),
    mean_span=st.floats(1.0, 6.0),
)
@settings(max_examples=80, deadline=None)
def test_t5_sides_reconstruct_the_text(encoder_length, mask_prob, mean_span):
    lengths = span_lengths(encoder_length, mask_prob, mean_span)
    if lengths.num_spans > lengths.raw_length - lengths.num_noise_tokens:
        with pytest.raises(ConfigError, match="--mean-noise-span-length"):
            build_span_objective(lengths, encoder_length, VOCABULARY)
        return
    blocks = make_blocks(3, lengths.raw_length)
    batch = build_span_objective(lengths, encoder_length, VOCABULARY).make_batch(blocks)
    for row in range(3):
        spans: dict[int, list[int]] = {}
        sentinel = -1
        for token in batch.target_ids[row, :-1].tolist():
            if token >= VOCABULARY.num_pieces:
                sentinel, spans[token] = token, []
            else:
                spans[sentinel].append(token)
        assert all(spans.values())
        text = []
        for token in batch.encoder_tokens[row, :-1].tolist():
            text += spans.pop(token) if token >= VOCABULARY.num_pieces else [token]
        assert not spans
        assert text == blocks.tokens[row].tolist()


def test_objectives_refuse_by_flag():
    few = Vocabulary(num_pieces=1000, num_sentinels=28)
    cases = [
        (few, ObjectiveConfig(objective="t5-span"), DataConfig(), "--vocab-extra-ids is 28"),
        (VOCABULARY, ObjectiveConfig(), DataConfig(decoder_seq_length=100), "--decoder-seq-length is 100"),
        (VOCABULARY, ObjectiveConfig(objective="t5-span"), DataConfig(block_mode="complete_doc"), "--block-mode"),
        (VOCABULARY, ObjectiveConfig(objective="deshuffle"), DataConfig(decoder_seq_length=9), "writes 512: leave it"),
        (Vocabulary.t5(1000, 27), ObjectiveConfig(objective="t5-span"), DataConfig(), "is 27; 28 spans need 28"),
        (
            Vocabulary.t5(1000, 28),
            ObjectiveConfig(objective="spactor"),
            DataConfig(),
            "28 spans and the mask token .* 29",
        ),
        (few, ObjectiveConfig(objective="t5-iid"), DataConfig(), "77 noise tokens .* need 79"),
        (few, ObjectiveConfig(objective="t5-metro"), DataConfig(), "up to 33 spans, .* need 34"),
    ]
    for vocabulary, objective, data, message in cases:
        with pytest.raises(ConfigError, match=message):
            build_objective(RunConfig(objective=objective, data=data), vocabulary)


GOLDEN = {
    "electra": "0e1d0e9207769f8340f9f805dd9342756d048cd12390247e2caf4174efbe7cc9",
    "spactor": "348629594ae0099ca7bea269eb91b94cf68bd1ff35ef383bfeb5f7fdf8afd7d7",
    "t5-metro": "fdb7a5b7589ef055d889ec614de3e0327f18740f87a9cdcadb51ccf18bbdfea9",
    "t5-iid": "1370df204e6fe7c0120e217b3f2646998cb80319ac46761bdec49f78590409c5",
    "prefix-lm": "e045d2bf7adabd54d2cae73d1aaa0ac56417df8e9aa5e454e1a8e62ea7cd1b94",
    "bert-style": "bc30d311156628449339e446190d01f4ff4e2f1f004c9c98fce512b1d00b571c",
    "mass-style": "7875c7522b9fbca076c9a46dc81025e75a08d45ba18bf96504c6b995c1e51343",
    "deshuffle": "f904edd50d6ce5ba192dde68f9004a7c318997b62e84e6641b48074ca1174a58",
    "drop-tokens": "f5f84fdba5849162d2934b137c12aa30e1b8adabfb92f48b7497eeb9a9082d60",
}


def make_golden_batch(name: str) -> Microbatch:
    """With METRO's vocabulary and spans for masks, so that all streams of random words are seen."""
    masks = {"mask_spans": True} if name == "electra" else {}
    run = RunConfig(objective=ObjectiveConfig(objective=name, **masks), data=DataConfig(encoder_seq_length=64))
    objective = build_objective(run, VOCABULARY)
    return objective.make_batch(make_golden_blocks(objective.raw_length))


def test_golden_batches():
    """Bytes that must never change: a run that is resumed after an upgrade sees the same batches."""
    metro = MetroObjective(vocabulary=VOCABULARY, sequence_length=64).make_batch(make_golden_blocks(64))
    spans = build_span_objective(span_lengths(64, 0.15, 3.0), 64, VOCABULARY)
    assert {name: digest(make_golden_batch(name)) for name in GOLDEN} == GOLDEN
    assert digest(metro) == "cf63e9b64552e2f1292aeb4809e8fd79529d5cde798d4f62067818709c59390e"
    assert (
        digest(spans.make_batch(make_golden_blocks(spans.raw_length)))
        == "e2194ca06bb22b6c7f74f5c389aa3514c7557a95ef617997ece71396fbaaca2f"
    )


def make_golden_blocks(length: int) -> Blocks:
    keys = BlockKeys(
        seed=1234, identity=np.full(4, 5, np.uint64), epoch=np.full(4, 1), block=np.array([0, 1, 2, 2**40])
    )
    tokens = (np.arange(4 * length).reshape(4, length) * 7919) % 995 + 5
    return Blocks(tokens=tokens, lengths=np.full(4, length), keys=keys)


def digest(batch: Microbatch) -> str:
    values = [getattr(batch, field.name) for field in fields(Microbatch)]
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in values if value is not None)).hexdigest()


def test_rounding_down():
    blocks = make_blocks(50, 512)
    batch = MetroObjective(vocabulary=VOCABULARY, sequence_length=512, rounds_at_random=False).make_batch(blocks)
    assert (batch.masked_valid.sum(dim=1) == 76).all()  # of 76.8


def test_without_a_generator_the_encoder_reads_the_masked_text():
    blocks = make_blocks(20, 64)
    with_generator = MetroObjective(vocabulary=VOCABULARY, sequence_length=64)
    alone = MetroObjective(vocabulary=VOCABULARY, sequence_length=64, has_generator=False)
    expected, batch = with_generator.make_batch(blocks), alone.make_batch(blocks)
    assert batch.shape == alone.shape(20)
    assert batch.shape.num_masked_slots == 0
    assert torch.equal(batch.encoder_tokens, expected.generator_tokens)
    assert batch.generator_tokens is None and batch.masked_slots is None and batch.uniforms is None
    for name in ("decoder_tokens", "target_slots", "target_ids", "target_valid"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name


def test_flags_reach_the_objective():
    run = RunConfig(model=ModelConfig(generator_num_layers=0), objective=ObjectiveConfig(probabilistic_rounding=False))
    objective = build_objective(run, VOCABULARY)
    assert (objective.has_generator, objective.rounds_at_random) == (False, False)
    assert build_objective(RunConfig(), VOCABULARY) == MetroObjective(vocabulary=VOCABULARY, sequence_length=512)
