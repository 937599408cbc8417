"""T5 v1.0 and v1.1 against transformers' T5 with the same random weights: loss, logits and every gradient.

One process and TP2, PP2, TP2 x PP2, in float64.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import T5ForConditionalGeneration

from megatron_metro.config.schema import ModelConfig
from megatron_metro.parallel.groups import ParallelGroups
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.hf_t5 import fill, make_exact, name_main_model, read_gradients, t5_config
from tests.helpers.layouts import Row
from tests.helpers.parity import GLOBAL_BATCH_SIZE, Arrays, Case, Outcome, local_microbatches, run_case, worst_error

Pool = Callable[[int], WorkerPool]
TOLERANCE = 1e-9

TIED = {"untie_embeddings_and_output_weights": False, "scale_lm_output": True}
UNTIED = {"untie_embeddings_and_output_weights": True, "scale_lm_output": False}
ODD_SIZES = {"encoder_num_layers": 3, "decoder_num_layers": 2, "kv_channels": 5}
MODELS: dict[str, dict[str, Any]] = {
    "v1.0": tiny.T5_V1_0,
    "v1.0 untied, unequal depth, odd d_kv": {**tiny.T5_V1_0, **UNTIED, **ODD_SIZES, "decoder_num_layers": 4},
    "v1.1": tiny.T5_V1_1,
    "v1.1 tied, unequal depth, odd d_kv": {**tiny.T5_V1_1, **TIED, **ODD_SIZES},
}
ROWS = [
    Row(spans=True),
    Row(spans=True, tp=2),
    Row(spans=True, tp=2, sp=True),
    Row(spans=True, pp=2),
    Row(spans=True, pp=2, vpp=2),
    Row(spans=True, tp=2, pp=2),
    Row(spans=True, tp=2, sp=True, pp=2),
]


def run_transformers(model: ModelConfig, case: Case, weights: Arrays) -> tuple[float, np.ndarray, Arrays]:
    """Loss, logits [rows, vocabulary] and gradients of transformers' T5 on the global batch."""
    network = T5ForConditionalGeneration(t5_config(model)).double().eval()
    if model.untie_embeddings_and_output_weights:  # transformers 5 ties v1.1's too and only leaves out the scaling
        network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().clone())
    make_exact(network)
    names = name_main_model(model)
    fill(network, names, weights)
    batch = local_microbatches(replace(case, micro_batch_size=GLOBAL_BATCH_SIZE), 0, 0, 1)[0]
    output = network(input_ids=batch.encoder_tokens, decoder_input_ids=batch.decoder_tokens, labels=batch.target_ids)
    output.loss.backward()
    return output.loss.item(), output.logits.detach().flatten(0, 1).numpy(), read_gradients(network, names, weights)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_t5_equals_transformers(name: str, row: Row, pool: Pool, groups: ParallelGroups) -> None:
    case = replace(replace(row, model=MODELS[name]).case(), num_steps=1, keeps_logits=True)
    found: Outcome = run_case(case) if row.world_size == 1 else pool(row.world_size).run(run_case, case)[0]
    loss, logits, gradients = run_transformers(case.run.model, case, found.weights)
    assert found.metrics[0]["lm loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert found.logits is not None and logits.std() > 0.01  # nothing is compared with zeros
    np.testing.assert_allclose(found.logits, logits, rtol=0.0, atol=TOLERANCE)
    assert worst_error(found.gradients, gradients)[0] <= TOLERANCE
