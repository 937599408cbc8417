"""Every preset builds: all modules of a model with as many parameters as were counted, without memory for them."""

from dataclasses import replace

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_metro.analysis.cost import count_parameters
from megatron_metro.config.chain import build_chain
from megatron_metro.config.presets import PRESETS
from megatron_metro.model import build as build_module
from megatron_metro.model.build import build_pieces
from megatron_metro.model.transformer_config import parameter_dtype
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.parallel.layout import single_piece
from tests.helpers.mutations import replaced_attribute

COUNTS = {
    "metro-tiny": 606_529,  # with 1,024 rows of vocabulary
    "metro-base": 255_979_265,
    "metro-base++": 279_207_169,
    "metro-large++": 852_455_425,
    "metro-xl": 3_370_046_465,
    "t5-metro-base": 225_618_432,
    "t5-metro-base++": 249_604_608,
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
    "spactor-base": 265_711_361,
    "spactor-large": 825_147_265,
}


def test_every_preset_is_here() -> None:
    assert set(COUNTS) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds(name: str, groups: ParallelGroups) -> None:
    run = PRESETS[name]()
    run = replace(run, model=replace(run.model, vocab_size=run.model.vocab_size or 1024))
    chain = build_chain(run.model)
    with FakeTensorMode(), replaced_attribute(build_module, "initialise", lambda *_: None):
        [piece] = build_pieces(run, single_piece(chain), groups, parameter_dtype(run.optimizer), pad_id=0)
    found = sum(parameter.numel() for parameter in piece.parameters())
    assert found == count_parameters(chain, run.model) == COUNTS[name]
