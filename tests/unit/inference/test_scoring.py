"""Log-probabilities of targets against transformers' T5, which reads one target at a time."""

from dataclasses import replace

import pytest
import torch

from megatron_metro.inference.options import WritingOptions
from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers import tiny
from tests.helpers.generation import T5_IDS, Texts, build_model, build_t5, draw_choices, draw_prompts, score_all

TEXTS = Texts(model=tiny.T5_V1_1, options=WritingOptions(), ids=T5_IDS, num_prompts=12)


@torch.no_grad()
def test_choices_are_scored_as_transformers_scores_each_alone(groups: ParallelGroups) -> None:
    model = build_model(TEXTS, groups)
    network = build_t5(model)
    expected = []
    for prompt, choices in zip(draw_prompts(12), draw_choices(12, T5_IDS)):
        logits = [
            network(
                input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[T5_IDS.start, *choice[:-1]]])
            ).logits[0]
            for choice in choices
        ]
        expected.append([
            float(row.log_softmax(-1).gather(1, torch.tensor(choice)[:, None]).sum())
            for row, choice in zip(logits, choices)
        ])  # fmt: skip
    for batch_size in (1, 5, 12):
        found = score_all(replace(TEXTS, batch_size=batch_size), model)
        assert [len(scores) for scores in found] == [1 + number % 4 for number in range(12)]
        for scores, wanted in zip(found, expected):
            assert scores == pytest.approx(wanted, abs=1e-9)


def test_all_choices_of_a_batch_share_one_pass_of_the_encoder(groups: ParallelGroups) -> None:
    model = build_model(TEXTS, groups)
    layer, rows = model.piece.encoder.layers[0], []
    layer.register_forward_pre_hook(lambda module, arguments: rows.append(arguments[0].shape[1]))
    score_all(replace(TEXTS, batch_size=12), model)
    assert rows == [12]
