"""SPACTOR's model against transformers' T5: its main model, and as generator a T5 encoder of other sizes with heads.

The losses are METRO's three: what is compared are the networks, the heads, and what is shared between them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5EncoderModel, T5ForConditionalGeneration

from megatron_metro.config.schema import ModelConfig
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.hf_t5 import Names, fill, make_exact, name_main_model, name_stack, read_gradients, t5_config
from tests.helpers.layouts import Row
from tests.helpers.parity import GLOBAL_BATCH_SIZE, Arrays, Case, Outcome, local_microbatches, run_case, worst_error

Pool = Callable[[int], WorkerPool]
TOLERANCE = 1e-9

MODELS: dict[str, dict[str, Any]] = {
    "own matrix": tiny.SPACTOR,
    "tied, narrow": {**tiny.SPACTOR, **tiny.NARROW_GENERATOR, "untie_mlm_head": False},
    "gated, wide, own matrix": {**tiny.SPACTOR, "generator_hidden_size": 24, "activation": "gated-gelu"},
}
ROWS = [
    Row(),
    Row(tp=2, sp=True),
    Row(pp=2, layout="Gg|gMeeRDddL"),
    Row(tp=2, pp=2, layout="GggM|eeRDddL"),
]
HEADS = {  # of ours that are plain tensors here
    "generator.embedding_projection.weight",
    "mlm_head.projection.weight",
    "mlm_head.output.weight",
    "mlm_head.output_bias",
    "rtd_head.dense.weight",
    "rtd_head.dense.bias",
    "rtd_head.output.weight",
    "rtd_head.output.bias",
}


class Spactor(nn.Module):
    """Two models of transformers and the heads between them."""

    def __init__(self, model: ModelConfig, weights: Arrays) -> None:
        super().__init__()
        self.model = model
        self.main = T5ForConditionalGeneration(t5_config(model)).double().eval()
        self.generator = T5EncoderModel(t5_config(model, "generator")).double().eval()
        make_exact(self)
        self.heads = nn.ParameterDict()
        for name in HEADS & weights.keys():
            self.heads[name.replace(".", "/")] = nn.Parameter(torch.from_numpy(weights[name]).clone())
        self.names = _prefix(name_main_model(model), "main.")
        self.names |= _prefix(name_stack(model, "generator", "encoder"), "generator.")
        assert weights.keys() == self.names.keys() | (HEADS & weights.keys())
        fill(self, self.names, weights)

    def head(self, name: str) -> Tensor:
        return self.heads[name.replace(".", "/")]

    def forward(self, batch: Any, sampled_ids: Tensor) -> dict[str, Tensor]:
        """The three losses of the global batch as means."""
        rows, columns = batch.masked_valid.nonzero(as_tuple=True)
        places = rows, batch.masked_slots[rows, columns]
        targets = batch.masked_ids[rows, columns]
        mlm = functional.cross_entropy(self.fill_slots(batch.generator_tokens)[places], targets)
        corrupted = batch.encoder_tokens.clone()
        corrupted[places] = sampled_ids[rows, columns]
        memory = self.main.encoder(input_ids=corrupted).last_hidden_state
        inner = functional.linear(memory, self.head("rtd_head.dense.weight"), self.head("rtd_head.dense.bias"))
        z = functional.linear(
            functional.gelu(inner), self.head("rtd_head.output.weight"), self.head("rtd_head.output.bias")
        ).squeeze(-1)
        labels = (corrupted != batch.encoder_tokens).double()
        logits = self.main(encoder_outputs=(memory,), decoder_input_ids=batch.decoder_tokens).logits
        return {
            "mlm loss": mlm,
            "rtd loss": functional.binary_cross_entropy_with_logits(z, labels),
            "lm loss": functional.cross_entropy(logits[places], targets),
        }

    def fill_slots(self, tokens: Tensor) -> Tensor:
        """The generator's logits [b, s, v]."""
        embedded = self.main.shared(tokens)
        if self.has("generator.embedding_projection.weight"):
            embedded = embedded @ self.head("generator.embedding_projection.weight").t()
        hidden = self.generator(inputs_embeds=embedded).last_hidden_state
        if self.has("mlm_head.projection.weight"):
            hidden = hidden @ self.head("mlm_head.projection.weight").t()
        if self.model.untie_mlm_head:
            return hidden @ self.head("mlm_head.output.weight").t() + self.head("mlm_head.output_bias")
        scaled = hidden * self.model.hidden_size**-0.5
        return scaled @ self.main.shared.weight.t() + self.head("mlm_head.output_bias")

    def has(self, name: str) -> bool:
        return name.replace(".", "/") in self.heads


def _prefix(names: Names, prefix: str) -> Names:
    return {ours: [(prefix + theirs, *rest) for theirs, *rest in slices] for ours, slices in names.items()}


def run_transformers(case: Case, found: Outcome) -> tuple[dict[str, float], Arrays]:
    """Losses and gradients, with the tokens that our generator drew."""
    network = Spactor(case.run.model, found.weights)
    batch = local_microbatches(replace(case, micro_batch_size=GLOBAL_BATCH_SIZE), 0, 0, 1)[0]
    assert found.sampled_ids is not None
    losses = network(batch, torch.from_numpy(found.sampled_ids))
    (losses["mlm loss"] + 50.0 * losses["rtd loss"] + losses["lm loss"]).backward()
    gradients = read_gradients(network, network.names, found.weights)
    for name in HEADS & found.weights.keys():
        gradients[name] = network.head(name).grad.numpy()
    return {name: loss.item() for name, loss in losses.items()}, gradients


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_spactor_equals_transformers(name: str, row: Row, pool: Pool) -> None:
    case = replace(replace(row, model=MODELS[name]).case(), num_steps=1)
    found: Outcome = pool(row.world_size).run(run_case, case)[0]
    losses, gradients = run_transformers(case, found)
    for loss, value in losses.items():
        assert found.metrics[0][loss] == pytest.approx(value, rel=TOLERANCE), loss
    assert worst_error(found.gradients, gradients)[0] <= TOLERANCE
    assert np.abs(found.gradients["mlm_head.output_bias"]).max() > 0.0
