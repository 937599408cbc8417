"""T5's dropouts stand where transformers' T5 has them, each with its rate: dropout as a function that can be compared.

In place of masks that differ with the order of draws, both models get x + rate sin(x), number by number: it tells every
place and rate apart, also from none, and does not depend on the layout.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import T5ForConditionalGeneration

from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.training.engine import Engine
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.hf_t5 import fill, make_exact, name_main_model, read_gradients, t5_config
from tests.helpers.layouts import Row
from tests.helpers.mutations import replaced_attribute
from tests.helpers.parity import GLOBAL_BATCH_SIZE, Arrays, Case, Outcome, local_microbatches, run_case, worst_error

Pool = Callable[[int], WorkerPool]

RATE = 0.3
DROPOUTS = {"hidden_dropout": RATE, "attention_dropout": RATE}
MODELS: dict[str, dict[str, Any]] = {
    "v1.0": {**tiny.T5_V1_0, **DROPOUTS, "dropout_places": "t5"},
    "v1.1": {**tiny.T5_V1_1, **DROPOUTS, "dropout_places": "t5"},
}


def add_wave(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return x + p * torch.sin(x) if training else x


def attend_with_wave(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """The fused kernel, whose own dropout nobody can replace, step by step."""
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return add_wave(scores.softmax(-1), dropout_p) @ value


@contextmanager
def waves(_: Engine | None = None) -> Iterator[None]:
    """Every dropout of this process is a wave."""
    with (
        replaced_attribute(functional, "dropout", add_wave),
        replaced_attribute(functional, "scaled_dot_product_attention", attend_with_wave),
    ):
        yield


def run_transformers(case: Case, weights: Arrays) -> tuple[np.ndarray, Arrays]:
    """Logits [rows, vocabulary] and gradients of transformers' T5 in training, on the global batch."""
    model = case.run.model
    config = t5_config(model)
    config.dropout_rate = RATE
    network = T5ForConditionalGeneration(config).double().train()
    if model.untie_embeddings_and_output_weights:
        network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().clone())
    make_exact(network)
    names = name_main_model(model)
    fill(network, names, weights)
    batch = local_microbatches(replace(case, micro_batch_size=GLOBAL_BATCH_SIZE), 0, 0, 1)[0]
    with waves():
        output = network(
            input_ids=batch.encoder_tokens, decoder_input_ids=batch.decoder_tokens, labels=batch.target_ids
        )
        output.loss.backward()
    return output.logits.detach().flatten(0, 1).numpy(), read_gradients(network, names, weights)


def make_case(row: Row, **model: Any) -> Case:
    return replace(replace(row, spans=True, model=model).case(), num_steps=1, keeps_logits=True, mutate=waves)


@pytest.mark.parametrize(
    ("name", "row"),
    [("v1.0", Row()), ("v1.1", Row()), ("v1.1", Row(tp=2)), ("v1.0", Row(tp=2, sp=True)), ("v1.0", Row(pp=2, vpp=2))],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_dropouts_stand_where_transformers_has_them(name: str, row: Row, pool: Pool, groups: ParallelGroups) -> None:
    case = make_case(row, **MODELS[name])
    found: Outcome = run_case(case) if row.world_size == 1 else pool(row.world_size).run(run_case, case)[0]
    logits, gradients = run_transformers(case, found.weights)
    assert found.logits is not None and logits.std() > 0.01
    np.testing.assert_allclose(found.logits, logits, rtol=0.0, atol=1e-9)
    assert worst_error(found.gradients, gradients)[0] <= 1e-9


@pytest.mark.parametrize("changes", [{"dropout_places": "metro"}, {"attention_dropout": 0.0}, {"hidden_dropout": 0.2}])
def test_other_places_and_rates_are_told_apart(changes: dict[str, Any], groups: ParallelGroups) -> None:
    case = make_case(Row(), **{**MODELS["v1.0"], **changes})
    found = run_case(case)
    assert found is not None
    logits, _ = run_transformers(case, found.weights)
    assert found.logits is not None and np.abs(found.logits - logits).max() > 1e-4
