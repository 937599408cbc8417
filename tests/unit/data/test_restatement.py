"""Every objective equals its restatement, on random sizes, rates, vocabularies and blocks."""

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from megatron_metro.config.errors import ConfigError
from megatron_metro.config.objectives import OBJECTIVES, PRETRAINING
from megatron_metro.config.spans import span_lengths
from tests.helpers.objective_cases import Case, check_case

FIRST_TIER, FULL_TIER = 50, 2000


@st.composite
def draw_case(draw, name: str) -> Case:
    """Any legal combination for an objective."""
    needs = OBJECTIVES[name]
    return Case(
        name=name,
        vocabulary=draw(st.sampled_from(["metro", "t5"])),
        length=draw(st.integers(3, 130)),
        rate=draw(st.one_of(st.just(0.15), st.floats(0.01, 0.9))),
        # The METRO paper's sampler is restated with its lengths of 1 to 5.
        mean_span=3.0 if name == "t5-metro" else draw(st.one_of(st.just(3.0), st.floats(1.0, 8.0))),
        lm_targets=draw(st.sampled_from(needs.lm_targets)),
        mask_spans=needs.masks_tokens and draw(st.booleans()),
        mask_special=draw(st.booleans()),
        spactor_rate=draw(st.sampled_from([0.15, 0.2, 0.9])),
        has_generator=needs.generator != "none" and (needs.generator == "needed" or draw(st.integers(0, 3)) > 0),
        is_padded=needs.takes_lines and draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )


def check(name: str, num_examples: int) -> None:
    @seed(1)
    @settings(max_examples=num_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=draw_case(name))
    def check_drawn(case: Case) -> None:
        if name in ("t5-span", "spactor"):
            lengths = span_lengths(case.length, case.rate, case.mean_span)
            if lengths.num_spans > lengths.raw_length - lengths.num_noise_tokens:
                with pytest.raises(ConfigError, match="--mean-noise-span-length"):
                    case.build()
                return
        check_case(case)

    check_drawn()


@pytest.mark.parametrize("name", PRETRAINING)
def test_objectives_equal_their_restatement(name):
    check(name, FIRST_TIER)


CORNERS = [
    *(Case(name="metro", mask_spans=True, rate=0.9, mean_span=1.0, seed=seed) for seed in range(5)),
    *(Case(name="electra", mask_spans=True, mask_special=False, is_padded=True, length=9, seed=s) for s in range(5)),
    *(Case(name="t5-metro", length=length, rate=0.9, is_padded=length > 5) for length in (3, 4, 5, 40)),
    *(Case(name="t5-iid", length=length, rate=rate) for length in (3, 130) for rate in (0.01, 0.5, 0.9)),
    Case(name="t5-metro", length=512),
    Case(name="t5-metro", length=114, lm_targets="all", seed=114),  # a span over the end is a run more
    Case(name="spactor", length=512, spactor_rate=0.2, vocabulary="t5"),
]


@pytest.mark.parametrize("case", CORNERS, ids=range(len(CORNERS)))
def test_corners(case):
    check_case(case)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", PRETRAINING)
def test_objectives_equal_their_restatement_full(name, record_property):
    check(name, FULL_TIER)
    record_property(f"{name}: examples", FULL_TIER)
