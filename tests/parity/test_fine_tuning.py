"""Fine-tuning against independent models that read one example at a time or pad: loss and every gradient, float64.

T5: transformers' own, given sources, attention mask and labels. METRO: plain PyTorch, every example by itself, with
neither padding nor rows.
"""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import T5ForConditionalGeneration

from megatron_metro.config.schema import ModelConfig
from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers import tiny
from tests.helpers.hf_t5 import fill, make_exact, name_main_model, read_gradients, t5_config
from tests.helpers.layouts import Row
from tests.helpers.pair_cases import METRO_IDS, T5_IDS, Example, draw_examples, write_out
from tests.helpers.parity import Arrays, Outcome, run_case, worst_error
from tests.helpers.reference import ReferenceMetro

TOLERANCE = 1e-9
FIRST_BATCH = 100  # the seed of the first step's examples

METRO: dict[str, dict[str, Any]] = {
    "token": {},
    "bias in the decoder": {"relative_attention": "per_stack", "relative_attention_decoder": True},
    "untied, RoBERTa's head": {"untie_embeddings_and_output_weights": True, "lm_head": "roberta"},
    "unequal depths": {"encoder_num_layers": 1, "decoder_num_layers": 3, "kv_channels": 5},
}
T5 = {"v1.0": tiny.T5_V1_0, "v1.1": tiny.T5_V1_1}
KINDS: tuple[Literal["padded", "packed"], ...] = ("padded", "packed")


def run_ours(model: dict[str, Any], kind: Literal["padded", "packed"]) -> Outcome:
    outcome = run_case(replace(fine_tuning_row(model), pairs=kind).case())
    assert outcome is not None
    return outcome


def fine_tuning_row(model: dict[str, Any]) -> Row:
    return Row(model={"generator_num_layers": 0, **model}, objective={"objective": "text-to-text"}, num_steps=1)


def run_transformers(model: ModelConfig, examples: list[Example], weights: Arrays) -> tuple[float, Arrays]:
    """Loss and gradients of transformers' T5, which pads sources and targets by itself."""
    network = T5ForConditionalGeneration(t5_config(model)).double().eval()
    if model.untie_embeddings_and_output_weights:
        network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().clone())
    make_exact(network)
    names = name_main_model(model)
    fill(network, names, weights)
    sources, targets = ([torch.tensor(example[side]) for example in examples] for side in (0, 1))
    mask = pad_sequence([torch.ones_like(source) for source in sources], batch_first=True)
    labels = pad_sequence(targets, batch_first=True, padding_value=-100)
    output = network(input_ids=pad_sequence(sources, batch_first=True), attention_mask=mask, labels=labels)
    output.loss.backward()
    return output.loss.item(), read_gradients(network, names, weights)


def run_plainly(model: ModelConfig, examples: list[Example], weights: Arrays) -> tuple[float, Arrays]:
    """Loss and gradients of the plain METRO, example by example."""
    leaves = {name: torch.from_numpy(array).requires_grad_() for name, array in weights.items()}
    step = ReferenceMetro(leaves, model, pad_id=1).run(write_out(examples, METRO_IDS))
    step.total.backward()
    gradients = {name: np.zeros_like(weights[name]) if p.grad is None else p.grad.numpy() for name, p in leaves.items()}
    return step.log["lm loss"], gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", T5)
def test_t5_equals_transformers(name: str, kind: Literal["padded", "packed"], groups: ParallelGroups) -> None:
    found = run_ours(T5[name], kind)
    examples = draw_examples(T5_IDS, FIRST_BATCH)
    loss, gradients = run_transformers(tiny.tiny_model(**T5[name]), examples, found.weights)
    assert found.metrics[0]["lm loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert worst_error(found.gradients, gradients)[0] <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METRO)
def test_metro_equals_the_oracle(name: str, kind: Literal["padded", "packed"], groups: ParallelGroups) -> None:
    found = run_ours(METRO[name], kind)
    model = tiny.tiny_model(**{"generator_num_layers": 0, **METRO[name]})
    loss, gradients = run_plainly(model, draw_examples(METRO_IDS, FIRST_BATCH), found.weights)
    assert found.metrics[0]["lm loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert worst_error(found.gradients, gradients)[0] <= TOLERANCE
