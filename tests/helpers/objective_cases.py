"""Blocks and checks that the tests of all objectives share."""

import hashlib
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from megatron_metro.batch import Microbatch
from megatron_metro.config.lengths import static_lengths
from megatron_metro.config.schema import DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from megatron_metro.data.blocks import Blocks
from megatron_metro.data.objectives import Objective, build_objective
from megatron_metro.data.randomness import BlockKeys
from megatron_metro.tokenizer import Vocabulary
from tests.helpers import restatement, tiny
from tests.helpers.objective_properties import check_properties
from tests.helpers.restatement import METRO_IDS, T5_IDS, Ids

VOCABULARIES = {
    "metro": (Vocabulary(num_pieces=1000, num_sentinels=400), METRO_IDS),
    "t5": (Vocabulary.t5(1000, 400), T5_IDS),
}
NUM_BLOCKS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """An objective on a few blocks."""

    name: str
    vocabulary: str = "metro"
    length: int = 64
    rate: float = 0.15
    mean_span: float = 3.0
    lm_targets: str = "masked"
    mask_spans: bool = False
    mask_special: bool = True
    spactor_rate: float = 0.15
    has_generator: bool = True
    is_padded: bool = False
    seed: int = 1

    @property
    def run(self) -> RunConfig:
        objective = ObjectiveConfig(
            objective=self.name,  # type: ignore[arg-type]
            mask_prob=self.rate,
            mean_noise_span_length=self.mean_span,
            lm_targets=self.lm_targets,  # type: ignore[arg-type]
            mask_spans=self.mask_spans,
            mask_special_tokens=self.mask_special,
            spactor_mask_prob=self.spactor_rate,
        )
        data = DataConfig(encoder_seq_length=self.length, block_mode="complete_doc" if self.is_padded else "full")
        return RunConfig(
            model=ModelConfig(generator_num_layers=2 if self.has_generator else 0), objective=objective, data=data
        )

    def build(self) -> Objective:
        return build_objective(self.run, VOCABULARIES[self.vocabulary][0])

    @property
    def ids(self) -> Ids:
        return VOCABULARIES[self.vocabulary][1]


def draw_blocks(objective: Objective, vocabulary: Vocabulary, seed: int, num_blocks: int, is_padded: bool) -> Blocks:
    """Random text with </s> here and there; where `is_padded`, blocks end early."""
    generator = np.random.Generator(np.random.PCG64(seed))
    length = objective.raw_length
    tokens = generator.integers(vocabulary.first_text_id, vocabulary.num_pieces, (num_blocks, length))
    tokens[generator.random(tokens.shape) < 0.03] = vocabulary.eos_id
    if objective.has_bos:
        tokens[:, 0] = vocabulary.bos_id
    lengths = generator.integers(1, length + 1, num_blocks) if is_padded else np.full(num_blocks, length)
    tokens[np.arange(length) >= lengths[:, None]] = vocabulary.pad_id
    keys = BlockKeys(
        seed=seed,
        identity=generator.integers(0, 2**63, num_blocks).astype(np.uint64),
        epoch=generator.integers(0, 5, num_blocks),
        block=generator.integers(0, 2**40, num_blocks),
    )
    return Blocks(tokens=tokens, lengths=lengths, keys=keys)


def check_case(case: Case) -> None:
    """The batch of a case equals its restatement, has its promised shape, and its rows stand alone."""
    vocabulary, _ = VOCABULARIES[case.vocabulary]
    objective = case.build()
    blocks = draw_blocks(objective, vocabulary, case.seed, NUM_BLOCKS, case.is_padded)
    batch = objective.make_batch(blocks)
    lengths, shape = static_lengths(case.run), batch.shape
    assert shape == objective.shape(NUM_BLOCKS)
    assert (shape.encoder_length, shape.decoder_length) == (lengths.encoder, lengths.decoder)
    assert (shape.num_masked_slots, shape.num_target_slots) == (lengths.masked, lengths.targets)
    check_contract(batch, vocabulary.pad_id)
    for row in range(NUM_BLOCKS):
        check_row(case, batch, blocks, row)
        text = blocks.tokens[row, : blocks.lengths[row]].tolist()
        check_properties(case.name, case.lm_targets, vocabulary, batch, row, text, case.rate)
    order = [2, 0, 1]
    shuffled = objective.make_batch(reorder(blocks, order))
    alone = objective.make_batch(blocks.rows(1, 2))
    for field in fields(Microbatch):
        value = getattr(batch, field.name)
        if value is not None:
            assert torch.equal(getattr(shuffled, field.name), value[order]), field.name
            assert torch.equal(getattr(alone, field.name), value[1:2]), field.name


def made_batch(run: RunConfig, num_sequences: int, seed: int) -> Microbatch:
    """The batch that the objective of a tiny run makes of random text."""
    vocabulary = Vocabulary(num_pieces=tiny.VOCAB_SIZE - 40, num_sentinels=40)
    objective = build_objective(run, vocabulary)
    return objective.make_batch(draw_blocks(objective, vocabulary, seed, num_sequences, is_padded=False))


def reorder(blocks: Blocks, order: list[int]) -> Blocks:
    keys = replace(blocks.keys, **{name: getattr(blocks.keys, name)[order] for name in ("identity", "epoch", "block")})
    return Blocks(tokens=blocks.tokens[order], lengths=blocks.lengths[order], keys=keys)


def check_contract(batch: Microbatch, pad_id: int) -> None:
    """What every microbatch promises: types, ascending slots, dump rows, padding at the end."""
    s, t = batch.encoder_tokens.shape[1], batch.decoder_tokens.shape[1]
    written = t or s  # without a decoder target slots are encoder positions
    lists = [(batch.target_slots, batch.target_ids, batch.target_valid, written)]
    if batch.generator_tokens is not None:
        assert batch.masked_slots is not None and batch.masked_ids is not None and batch.masked_valid is not None
        lists.append((batch.masked_slots, batch.masked_ids, batch.masked_valid, s))
        assert batch.uniforms is not None and batch.uniforms.dtype == torch.float64
        assert ((batch.uniforms >= 0) & (batch.uniforms < 1)).all()
    for slots, ids, valid, width in lists:
        assert slots.dtype == ids.dtype == torch.int64 and valid.dtype == torch.bool
        assert (slots[~valid] == width).all() and (slots[valid] < width).all() and (ids[~valid] == pad_id).all()
        assert (slots.diff(dim=1)[valid[:, 1:]] > 0).all()
        assert (valid[:, :-1] >= valid[:, 1:]).all()
    for tokens, padding in (
        (batch.encoder_tokens, batch.encoder_padding),
        (batch.decoder_tokens[:, 1:], None if batch.decoder_padding is None else batch.decoder_padding[:, 1:]),
    ):
        if padding is not None:
            assert (tokens[padding] == pad_id).all() and (padding[:, :-1] <= padding[:, 1:]).all()


def check_row(case: Case, batch: Microbatch, blocks: Blocks, row: int) -> None:
    """One row against the restatement."""
    tokens = blocks.tokens[row, : blocks.lengths[row]].tolist()
    if case.name in ("metro", "electra"):
        check_masking_row(case, batch, blocks, row, tokens)
        return
    source, target = restate_sides(case, blocks, row, tokens)
    assert real(batch.encoder_tokens, batch.encoder_padding, row) == source
    assert real(batch.decoder_tokens, batch.decoder_padding, row) == [case.ids.start, *target[:-1]]
    valid = batch.target_valid[row]
    assert batch.target_ids[row][valid].tolist() == target
    assert batch.target_slots[row][valid].tolist() == list(range(len(target)))
    if case.name == "spactor" and case.has_generator:
        places, seen = restatement.spactor_masks(source, blocks.keys, row, case.spactor_rate, case.ids)
        check_masks(batch, row, places, seen, source, restatement.fill_uniforms(case.length, blocks.keys, row, places))


def restate_sides(case: Case, blocks: Blocks, row: int, tokens: list[int]) -> tuple[list[int], list[int]]:
    keys, ids = blocks.keys, case.ids
    match case.name:
        case "t5-span" | "spactor":
            return restatement.t5_span(tokens, keys, row, case.rate, case.mean_span, ids)
        case "t5-iid":
            return restatement.t5_iid(tokens, keys, row, case.rate, ids)
        case "drop-tokens":
            return restatement.drop_tokens(tokens, keys, row, case.rate, ids)
        case "bert-style" | "mass-style":
            share = 0.1 if case.name == "bert-style" else 0.0
            return restatement.masked_text(tokens, keys, row, case.rate, share, ids)
        case "prefix-lm":
            return restatement.prefix_lm(tokens, keys, row, ids)
        case "deshuffle":
            return restatement.deshuffle(tokens, keys, row, ids)
        case _:
            assert case.name == "t5-metro"
            most = -int(-case.rate * 0.9 * case.length / 3 // 1)  # the most starts a block of full length can have
            source, target = restatement.metro_spans(tokens, case.length, most, keys, row, case.rate, ids)
            return source, tokens if case.lm_targets == "all" else target


def check_masking_row(case: Case, batch: Microbatch, blocks: Blocks, row: int, tokens: list[int]) -> None:
    """METRO and ELECTRA: masks as restated, then what each --lm-targets makes of them."""
    ids, ends = case.ids, (0, 2) if case.vocabulary == "metro" else (1,)
    allowed = None if case.mask_special else [p for p, token in enumerate(tokens) if token not in ends]
    mean = case.mean_span if case.mask_spans else None
    places, seen = restatement.metro_masks(tokens, case.length, blocks.keys, row, case.rate, ids, mean, allowed)
    if case.has_generator:
        assert real(batch.encoder_tokens, batch.encoder_padding, row) == tokens
        uniforms = restatement.fill_uniforms(case.length, blocks.keys, row, places)
        check_masks(batch, row, places, seen, tokens, uniforms)
    else:
        assert real(batch.encoder_tokens, batch.encoder_padding, row) == seen
        assert batch.generator_tokens is None and batch.masked_slots is None and batch.uniforms is None
    masked = [tokens[place] for place in places]
    written = {"masked": tokens, "all": tokens, "masked-only": masked}[case.lm_targets]
    if case.name == "electra":
        assert batch.decoder_tokens.shape[1] == 0 and batch.decoder_padding is None
    else:
        read = real(batch.decoder_tokens, batch.decoder_padding, row)
        assert read == ([ids.start, *written[:-1]] if written else [])
    valid = batch.target_valid[row]
    slots = {"masked": places, "all": range(len(tokens)), "masked-only": range(len(places))}[case.lm_targets]
    assert batch.target_slots[row][valid].tolist() == list(slots)
    assert batch.target_ids[row][valid].tolist() == (tokens if case.lm_targets == "all" else masked)


def check_masks(
    batch: Microbatch, row: int, places: list[int], seen: list[int], tokens: list[int], uniforms: list[float]
) -> None:
    """What the generator reads and must fill."""
    assert batch.generator_tokens is not None and batch.masked_slots is not None and batch.masked_ids is not None
    assert batch.masked_valid is not None and batch.uniforms is not None
    assert real(batch.generator_tokens, batch.encoder_padding, row) == seen
    valid = batch.masked_valid[row]
    assert batch.masked_slots[row][valid].tolist() == places
    assert batch.masked_ids[row][valid].tolist() == [tokens[place] for place in places]
    assert batch.uniforms[row][valid].tolist() == uniforms
    assert (batch.uniforms[row][~valid] == 0).all()


def real(tokens: torch.Tensor, padding: torch.Tensor | None, row: int) -> list[int]:
    """A row without its padding."""
    return (tokens[row] if padding is None else tokens[row][~padding[row]]).tolist()


def digest(batch: Microbatch) -> str:
    values = [getattr(batch, field.name) for field in fields(Microbatch)]
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in values if value is not None)).hexdigest()
