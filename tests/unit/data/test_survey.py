"""T5's survey objectives on the sentence of the paper's Table 3, and what the METRO paper's T5 sampler draws."""

import numpy as np
import pytest
import torch

from megatron_metro.config.lengths import static_lengths
from megatron_metro.config.schema import DataConfig, ObjectiveConfig, RunConfig
from megatron_metro.data.masking import mark_spans
from megatron_metro.data.metro_spans import MetroSpans, write_sides
from megatron_metro.data.span_objective import replace_spans
from megatron_metro.data.survey_objectives import drop_noise, mask_noise, replace_runs, shuffle_text, split_text
from megatron_metro.data.text_to_text import Sides
from tests.helpers.objective_cases import VOCABULARIES, Case, draw_blocks

SENTENCE = "Thank you for inviting me to your party last week ."
WORDS = [*SENTENCE.split(), "apple"]
VOCABULARY = VOCABULARIES["t5"][0]
IDS = {word: 10 + place for place, word in enumerate(WORDS)} | {
    "<M>": VOCABULARY.masked_id,
    "<X>": VOCABULARY.vocab_size - 1,
    "<Y>": VOCABULARY.vocab_size - 2,
    "<Z>": VOCABULARY.vocab_size - 3,
    "</s>": 1,
}


def encode(text: str) -> np.ndarray:
    return np.array([[IDS[word] for word in text.split()]])


def mark(*words: str) -> np.ndarray:
    return np.array([[word in words for word in SENTENCE.split()]])


def decode(sides: Sides) -> list[str]:
    names = {token: word for word, token in IDS.items()}
    pairs = ((sides.inputs, sides.input_lengths), (sides.targets, sides.target_lengths))
    return [" ".join(names[token] for token in side[0, : lengths[0]].tolist()) for side, lengths in pairs]


TOKENS, NOISE = encode(SENTENCE), mark("for", "inviting", "last")


def test_iid_noise_replace_spans():
    """Also figure 2, whose final sentinel ends the target."""
    run = RunConfig(
        objective=ObjectiveConfig(objective="t5-iid", mask_prob=0.3), data=DataConfig(encoder_seq_length=12)
    )
    lengths = static_lengths(run)
    assert decode(replace_runs(TOKENS, NOISE, lengths, VOCABULARY)) == [
        "Thank you <X> me to your party <Y> week . </s>",
        "<X> for inviting <Y> last <Z> </s>",
    ]


def test_iid_noise_drop_tokens():
    assert decode(drop_noise(TOKENS, NOISE, VOCABULARY.eos_id)) == [
        "Thank you me to your party week . </s>",
        "for inviting last </s>",
    ]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("<M> <M> <M> <M> <M> <M> <M> <M> apple <M> <M>", "Thank you <M> <M> me to your party apple week . </s>"),
        ("<M> <M> <M> <M> <M> <M> <M> <M> <M> <M> <M>", "Thank you <M> <M> me to your party <M> week . </s>"),
    ],
    ids=["bert-style", "mass-style"],
)
def test_masked(shown, expected):
    assert decode(mask_noise(TOKENS, NOISE, encode(shown), VOCABULARY.eos_id)) == [expected, f"{SENTENCE} </s>"]


def test_prefix():
    assert decode(split_text(TOKENS, np.array([4]), VOCABULARY)) == [
        "Thank you for inviting </s>",
        "me to your party last week . </s>",
    ]


def test_deshuffle():
    order = encode("party me for your to . last you inviting week Thank") - 10
    assert decode(shuffle_text(TOKENS, order, VOCABULARY.eos_id)) == [
        "party me for your to . last you inviting week Thank </s>",
        f"{SENTENCE} </s>",
    ]


def test_random_spans():
    """The library's arithmetic ends every text with a span, so the sentence ends before `week .` and without <Z>."""
    kept, noise = np.array([[2, 1]]), np.array([[3, 3]])
    names = {token: word for word, token in IDS.items()}
    sides = replace_spans(TOKENS[:, :9], *mark_spans(kept, noise), noise, VOCABULARY)
    assert [" ".join(names[token] for token in side[0].tolist()) for side in sides] == [
        "Thank you <X> to <Y> </s>",
        "<X> for inviting me <Y> your party last </s>",
    ]


@pytest.fixture(scope="module")
def metro_spans():
    """10,000 blocks of 512 tokens, their noise and their empty spans."""
    case = Case(name="t5-metro", length=512)
    blocks = draw_blocks(case.build(), VOCABULARIES["metro"][0], 1, 10_000, is_padded=False)
    parts = [blocks.rows(row, row + 100) for row in range(0, 10_000, 100)]
    drawn = [MetroSpans(mask_prob=0.15, longest_span=5, num_starts=24).draw(part) for part in parts]
    return case, blocks, *(np.concatenate(masks) for masks in zip(*drawn))


def test_metro_sampler_reproduces_the_reference(metro_spans, record_property):
    """Reference section 3.5: 12.9 % masked, 20.3 spans of mean length 3.24, 6 % over 5, and 7.8 empty spans."""
    case, blocks, noise, empty = metro_spans
    sides = write_sides(blocks, noise, empty, static_lengths(case.run), VOCABULARIES["metro"][0])
    edges = np.diff(np.pad(noise, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    runs = np.nonzero(edges.ravel() == -1)[0] - np.nonzero(edges.ravel() == 1)[0]
    found = {
        "masked": noise.mean(),
        "spans": len(runs) / len(noise),
        "length": runs.mean(),
        "over 5": (runs > 5).mean(),
        "empty": empty.sum() / len(noise),
        "input": sides.input_lengths.mean(),
        "target": sides.target_lengths.mean(),
    }
    for name, value in found.items():
        record_property(name, round(float(value), 4))
    assert found["masked"] == pytest.approx(0.129, abs=0.0006)
    assert found["spans"] == pytest.approx(20.3, abs=0.06)
    assert found["length"] == pytest.approx(3.24, abs=0.02)
    assert found["over 5"] == pytest.approx(0.06, abs=0.01)
    assert found["empty"] == pytest.approx(7.8, abs=0.06)
    assert found["input"] == pytest.approx(474, abs=1)
    assert found["target"] == pytest.approx(95, abs=1)


def test_metro_sampler_treats_all_positions_alike(metro_spans):
    """Spans may start anywhere and wrap around, so every position is masked as often."""
    noise = metro_spans[2]
    counts = torch.from_numpy(noise.sum(axis=0)).double()
    # Neighbours go together, so the statistic is spread wider than a chi-square's; its mean is that of single masks.
    statistic = ((counts - counts.mean()) ** 2 / (counts.mean() * (1 - noise.mean()))).sum().item()
    assert abs(statistic - 511) < 12 * np.sqrt(2 * 511)
    assert abs(counts[0] - counts.mean()) < 5 * counts.mean().sqrt()
    assert abs(counts[-1] - counts.mean()) < 5 * counts.mean().sqrt()
