"""Parameter counts of the T5 presets: the published models', and those of transformers' T5 without allocating it."""

import pytest
import torch
from transformers import T5ForConditionalGeneration

from megatron_metro.analysis.cost import count_parameters, main_model
from megatron_metro.config.chain import build_chain
from megatron_metro.config.presets import PRESETS
from megatron_metro.config.schema import ModelConfig
from tests.helpers.hf_t5 import t5_config

PUBLISHED = {
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1.1-small": 76_961_152,
    "t5-v1.1-base": 247_577_856,
    "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184,
    "t5-v1.1-xxl": 11_135_332_352,
}


def count(model: ModelConfig) -> int:
    return count_parameters(build_chain(model), model)


@pytest.mark.parametrize("name", PUBLISHED)
def test_t5_has_the_published_number_of_parameters(name: str) -> None:
    model = PRESETS[name]().model
    with torch.device("meta"):
        network = T5ForConditionalGeneration(t5_config(model))
    theirs = sum(parameter.numel() for parameter in network.parameters())
    if model.untie_embeddings_and_output_weights and network.lm_head.weight is network.shared.weight:
        theirs += network.lm_head.weight.numel()  # transformers 5 ties v1.1's too and only leaves out the scaling
    assert count(model) == theirs == PUBLISHED[name]


def test_metro_s_controls_are_its_main_models() -> None:
    """Reference section 1.9."""
    assert count(PRESETS["t5-metro-base"]().model) == 225_618_432
    assert count(PRESETS["t5-metro-base++"]().model) == 249_604_608


@pytest.mark.parametrize(
    ("name", "t5", "h", "layers", "ffn", "heads", "rtd"),
    [("spactor-base", "t5-base", 768, 4, 1024, 12, 3072), ("spactor-large", "t5-large", 1024, 6, 2048, 16, 4096)],
)
def test_spactor_is_t5_and_a_generator(name: str, t5: str, h: int, layers: int, ffn: int, heads: int, rtd: int) -> None:
    model = PRESETS[name]().model
    assert count(main_model(model)) == PUBLISHED[t5]
    stack = layers * (4 * h * h + 2 * h * ffn + 2 * h) + h + 32 * heads
    mlm, replaced = 32_128 * h + 32_128, h * rtd + rtd + rtd + 1
    assert count(model) == PUBLISHED[t5] + stack + mlm + replaced
