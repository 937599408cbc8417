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
from tests.parity.test_t5_sizes import PUBLISHED

COUNTS = {
    "metro-tiny": 606_529,  # with 1,024 rows of vocabulary
    "metro-base": 255_979_265,
    "metro-base++": 279_207_169,
    "metro-large++": 852_455_425,
    "metro-xl": 3_370_046_465,
    "t5-metro-base": 225_618_432,
    "t5-metro-base++": 249_604_608,
    **PUBLISHED,
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
