"""Random examples of fine-tuning in three forms: padded rows, packed rows, and each one by itself, written by hand."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import torch

from megatron_metro.batch import Microbatch
from megatron_metro.config.schema import DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from megatron_metro.data.blocks import Blocks
from megatron_metro.data.objectives import build_objective
from megatron_metro.data.randomness import BlockKeys
from megatron_metro.tokenizer import Vocabulary
from tests.helpers import tiny

Example = tuple[list[int], list[int]]

NUM_SENTINELS = 40
NUM_PIECES = tiny.VOCAB_SIZE - NUM_SENTINELS
METRO_IDS = Vocabulary(num_pieces=NUM_PIECES, num_sentinels=NUM_SENTINELS)
T5_IDS = Vocabulary.t5(NUM_PIECES, NUM_SENTINELS)
LONGEST = (10, 8)  # source and target
PADDED_LENGTHS, PACKED_LENGTHS = (12, 8), (32, 24)  # of rows; multiples of four, for as many tensor-parallel ranks
ROW_SIZES = (1, 3, 2) * 4  # examples of each packed row
NUM_EXAMPLES = sum(ROW_SIZES)


def vocabulary_of(model: ModelConfig) -> Vocabulary:
    """METRO's or T5's ids, as the architecture."""
    return T5_IDS if model.norm_placement == "pre" else METRO_IDS


def draw_examples(vocabulary: Vocabulary, seed: int, count: int = NUM_EXAMPLES) -> list[Example]:
    """Sources and targets of different lengths, framed by hand."""
    rng = np.random.default_rng(seed)

    def draw(longest: int, start: list[int]) -> list[int]:
        length = int(rng.integers(1, longest - len(start)))
        return [*start, *rng.integers(5, NUM_PIECES, length).tolist(), vocabulary.eos_id]

    start = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
    return [(draw(LONGEST[0], start), draw(LONGEST[1], [])) for _ in range(count)]


def lay_out(rows: Sequence[Sequence[Example]], lengths: tuple[int, int], pad_id: int) -> Blocks:
    """Rows of examples as blocks of two stretches."""
    tokens = np.full((len(rows), sum(lengths)), pad_id)
    for row, examples in enumerate(rows):
        for side, first in enumerate((0, lengths[0])):
            stretch = [token for example in examples for token in example[side]]
            assert len(stretch) <= lengths[side]
            tokens[row, first : first + len(stretch)] = stretch
    numbers = np.arange(len(rows))
    keys = BlockKeys(seed=1, identity=np.ones(len(rows), np.uint64), epoch=np.zeros(len(rows), int), block=numbers)
    return Blocks(tokens=tokens, lengths=(tokens != pad_id).sum(axis=1), keys=keys)


def make_batch(
    rows: Sequence[Sequence[Example]], lengths: tuple[int, int], vocabulary: Vocabulary, *, is_packed: bool
) -> Microbatch:
    """What the objective makes of rows."""
    data = DataConfig(encoder_seq_length=lengths[0], decoder_seq_length=lengths[1], pack_examples=is_packed)
    run = RunConfig(objective=ObjectiveConfig(objective="text-to-text"), data=data)
    run = replace(run, model=replace(run.model, generator_num_layers=0))
    return build_objective(run, vocabulary).make_batch(lay_out(rows, lengths, vocabulary.pad_id))


def group(examples: Sequence[Example], sizes: Sequence[int]) -> list[Sequence[Example]]:
    """So many examples to each row."""
    bounds = [0, *accumulate(sizes)]
    return [examples[start:stop] for start, stop in pairwise(bounds)]


def pair_batch(model: ModelConfig, seed: int, *, is_packed: bool) -> Microbatch:
    """The same examples of a seed, one a row or packed."""
    vocabulary = vocabulary_of(model)
    examples = draw_examples(vocabulary, seed)
    if is_packed:
        return make_batch(group(examples, ROW_SIZES), PACKED_LENGTHS, vocabulary, is_packed=True)
    return make_batch([[example] for example in examples], PADDED_LENGTHS, vocabulary, is_packed=False)


def write_out(examples: Sequence[Example], vocabulary: Vocabulary) -> list[Microbatch]:
    """Each example alone in a microbatch without padding; METRO's decoder starts with </s>, T5's with pad."""
    start = 0 if vocabulary.is_t5 else 2
    batches = []
    for source, target in examples:
        ids = torch.tensor([target])
        batches.append(
            Microbatch(
                encoder_tokens=torch.tensor([source]),
                decoder_tokens=torch.tensor([[start, *target[:-1]]]),
                target_slots=torch.arange(len(target))[None],
                target_ids=ids,
                target_valid=torch.ones_like(ids, dtype=torch.bool),
            )
        )
    return batches
