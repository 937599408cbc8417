"""Terms of a step: their divisors, what is injected, and what the log says."""

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional

from megatron_metro.batch import Microbatch
from megatron_metro.config.schema import ObjectiveConfig
from megatron_metro.losses.step import COUNT_NAMES, StepLosses, count_tokens

METRO_NAMES = {
    "lm loss", "mlm loss", "rtd loss", "total loss", "generator accuracy", "replaced accuracy", "unreplaced accuracy",
    "rtd replaced accuracy", "rtd unreplaced accuracy", "replace ratio",
}  # fmt: skip


def make_microbatch(num_slots: tuple[int, ...] = (3, 2), padded: bool = True) -> Microbatch:
    b, s, g = len(num_slots), 10, 4
    valid = torch.arange(g) < torch.tensor(num_slots)[:, None]
    slots = torch.where(valid, torch.arange(g).expand(b, g) * 2, s)
    tokens = torch.arange(b * s).view(b, s) + 5
    padding = (torch.arange(s) >= torch.tensor([[10], [7]])[:b]) if padded else None
    return Microbatch(
        encoder_tokens=tokens, decoder_tokens=tokens, target_slots=slots, target_ids=torch.ones_like(slots),
        target_valid=valid, generator_tokens=tokens, masked_slots=slots, masked_ids=torch.ones_like(slots),
        masked_valid=valid, uniforms=torch.rand(b, g, dtype=torch.float64), encoder_padding=padding,
    )  # fmt: skip


def test_counts_are_those_of_all_microbatches():
    counts = count_tokens([make_microbatch(), make_microbatch(padded=False), make_microbatch((4, 0))])
    assert dict(zip(COUNT_NAMES, counts.tolist())) == {"masked": 14, "real": 54, "targets": 14, "sequences": 6}
    plain = Microbatch(
        encoder_tokens=torch.ones(2, 8).long(), decoder_tokens=torch.ones(2, 5).long(),
        target_slots=torch.arange(5).expand(2, 5), target_ids=torch.ones(2, 5).long(),
        target_valid=torch.ones(2, 5).bool(),
    )  # fmt: skip
    assert count_tokens([plain]).tolist() == [0, 16, 10, 2]


def make_losses(
    objective: ObjectiveConfig | None = None, scale: float = 1.0, *, has_lm_head: bool = True, **counts: int
) -> StepLosses:
    numbers = {"masked": 5, "real": 17, "targets": 5, "sequences": 2} | counts
    counted = torch.tensor([numbers[name] for name in COUNT_NAMES], dtype=torch.float64)
    return StepLosses(objective or ObjectiveConfig(), counted, torch.tensor([scale]), has_lm_head=has_lm_head)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What a model would have computed for one microbatch: 5 valid slots of 8, 17 real tokens of 20."""

    valid: torch.Tensor
    mlm_nll: torch.Tensor
    mlm_right: torch.Tensor
    rtd: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # logits, replaced, real
    lm_nll: torch.Tensor
    lm_right: torch.Tensor
    prob: torch.Tensor
    filled_wrong: torch.Tensor


def make_case(seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.arange(4) < torch.tensor([[3], [2]])
    mlm_nll, lm_nll = (torch.rand(2, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    mlm_right, lm_right = (torch.rand(2, 4, generator=generator) < 0.5 for _ in range(2))
    logits = torch.randn(10, 2, generator=generator, dtype=torch.float64).requires_grad_()
    is_real = torch.arange(10)[:, None] < torch.tensor([10, 7])
    filled_wrong = torch.tensor([[True, False, True, True], [False, True, False, False]])
    is_replaced = torch.zeros(10, 2, dtype=torch.bool)
    is_replaced[:4] = (filled_wrong & valid).t()
    return Case(
        valid=valid, mlm_nll=mlm_nll, mlm_right=mlm_right, rtd=(logits, is_replaced, is_real), lm_nll=lm_nll,
        lm_right=lm_right, prob=torch.rand(2, 4, generator=generator), filled_wrong=filled_wrong,
    )  # fmt: skip


def add_lm(losses: StepLosses, case: Case) -> torch.Tensor:
    losses.record_lm(case.lm_right, case.filled_wrong, case.valid)
    return losses.add_lm(case.lm_nll, case.valid, case.prob)


def add_all(losses: StepLosses, case: Case) -> dict[str, torch.Tensor]:
    mlm = losses.add_mlm(case.mlm_nll, case.mlm_right, case.filled_wrong, case.valid)
    return {"mlm": mlm, "rtd": losses.add_rtd(*case.rtd), "lm": add_lm(losses, case)}


def test_injected_and_returned_losses_make_up_the_objective():
    """LM + injected MLM + injected RTD = mean MLM + mean LM + 50 x mean RTD, over the global counts."""
    losses, case = make_losses(masked=9, real=40, targets=12), make_case()  # the microbatch is a part of the step
    terms = add_all(losses, case)
    logits, is_replaced, is_real = case.rtd
    bce = functional.binary_cross_entropy_with_logits(
        logits.detach()[is_real], is_replaced[is_real].double(), reduction="sum"
    )
    expected = (case.mlm_nll[case.valid].sum() / 9 + case.lm_nll[case.valid].sum() / 12 + 50 * bce / 40).item()
    total = sum(terms.values())
    assert total.item() == pytest.approx(expected, abs=1e-13)
    total.backward()
    assert not case.mlm_nll.grad[~case.valid].any() and not case.lm_nll.grad[~case.valid].any()
    assert case.mlm_nll.grad[case.valid].tolist() == pytest.approx([1 / 9] * 5)


def test_weights_of_the_objective():
    objective = ObjectiveConfig(mlm_loss_weight=2.0, rtd_loss_weight=3.0, lm_loss_weight=0.5)
    plain = add_all(make_losses(ObjectiveConfig(rtd_loss_weight=1.0)), make_case())
    losses = make_losses(objective)
    weighted = add_all(losses, make_case())
    for name, factor in (("mlm", 2.0), ("rtd", 3.0), ("lm", 0.5)):
        assert weighted[name].item() == pytest.approx(factor * plain[name].item())
    log = losses.summarise()
    assert log["total loss"] == pytest.approx(2 * log["mlm loss"] + 3 * log["rtd loss"] + 0.5 * log["lm loss"])


def test_weighted_lm_loss_multiplies_by_the_probability_and_divides_by_the_count():
    losses, case = make_losses(ObjectiveConfig(weighted_lm_loss=True)), make_case()
    expected = (case.lm_nll * case.prob)[case.valid].sum().item()
    assert add_lm(losses, case).item() == pytest.approx(expected / 5)
    assert losses.summarise()["lm loss"] == pytest.approx(expected / 5)


def test_log_of_a_step():
    losses, case = make_losses(), make_case()
    add_all(losses, case)
    valid, wrong, right = case.valid, case.filled_wrong, case.lm_right
    log = losses.summarise()
    assert set(log) == METRO_NAMES
    assert log["mlm loss"] == pytest.approx(case.mlm_nll[valid].mean().item())
    assert log["lm loss"] == pytest.approx(case.lm_nll[valid].mean().item())
    assert log["total loss"] == pytest.approx(log["lm loss"] + log["mlm loss"] + 50 * log["rtd loss"])
    assert log["generator accuracy"] == pytest.approx(100 * case.mlm_right[valid].double().mean().item())
    assert log["replaced accuracy"] == pytest.approx(100 * right[valid & wrong].double().mean().item())
    assert log["unreplaced accuracy"] == pytest.approx(100 * right[valid & ~wrong].double().mean().item())
    assert log["replace ratio"] == pytest.approx(100 * (valid & wrong).sum().item() / 17)
    logits, is_replaced, is_real = case.rtd
    replaced, unreplaced = is_replaced & is_real, ~is_replaced & is_real
    assert log["rtd replaced accuracy"] == pytest.approx(100 * (logits >= 0)[replaced].double().mean().item())
    assert log["rtd unreplaced accuracy"] == pytest.approx(100 * (logits < 0)[unreplaced].double().mean().item())


def test_stages_and_microbatches_add_up():
    """Terms of two microbatches spread over three stages, summed, give the log of one process."""
    counts = {"masked": 10, "real": 34, "targets": 10}
    whole, first, second, third = (make_losses(**counts) for _ in range(4))
    for seed in (0, 1):
        case = make_case(seed)
        add_all(whole, case)
        first.add_mlm(case.mlm_nll, case.mlm_right, case.filled_wrong, case.valid)
        second.add_rtd(*case.rtd)
        add_lm(third, case)
    first.sums += second.sums + third.sums
    assert first.summarise() == pytest.approx(whole.summarise(), abs=1e-12)


def test_validation_divides_summed_terms_by_summed_counts():
    first, second, a, b = make_losses(), make_losses(real=23, targets=10), make_case(0), make_case(1)
    add_all(first, a)
    add_all(second, b)
    merged = StepLosses.merge([first, second]).summarise()
    total = a.lm_nll[a.valid].sum() + b.lm_nll[b.valid].sum()
    assert merged["lm loss"] == pytest.approx(total.item() / 15)
    assert merged["mlm loss"] == pytest.approx((a.mlm_nll[a.valid].sum() + b.mlm_nll[b.valid].sum()).item() / 10)
    assert first.summarise()["lm loss"] == pytest.approx(a.lm_nll[a.valid].mean().item())


def test_without_a_generator_only_the_lm_term_is_named():
    plain = make_losses(ObjectiveConfig(objective="t5-span"), masked=0)
    assert plain.add_lm(torch.ones(2, 4), torch.ones(2, 4).bool(), None).item() == pytest.approx(8 / 5)
    assert plain.summarise() == pytest.approx({"lm loss": 8 / 5, "total loss": 8 / 5})


def test_a_step_without_masked_tokens_is_zero():
    losses, case = make_losses(masked=0, targets=0), make_case()
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    terms = [
        losses.add_mlm(case.mlm_nll, nothing, nothing, nothing),
        losses.add_rtd(case.rtd[0], nothing.new_zeros(10, 2), case.rtd[2]),
        losses.add_lm(case.lm_nll, nothing, case.prob),
    ]
    assert [term.item() for term in terms] == [0.0, 0.0, 0.0]
    assert all(value == 0.0 for value in losses.summarise().values())


def test_spactor_sums_over_tokens_and_divides_by_sequences():
    weights = {"mlm_loss_weight": 1.0, "rtd_loss_weight": 10.0, "lm_loss_weight": 10.0}
    case = make_case()
    logits, is_replaced, is_real = case.rtd
    bce = functional.binary_cross_entropy_with_logits(logits[is_real], is_replaced[is_real].double(), reduction="sum")
    sums = [case.mlm_nll[case.valid].sum().item(), bce.item(), case.lm_nll[case.valid].sum().item()]
    for normalisation, divisors in (("sum", (2, 2, 2)), ("mean", (5, 17, 5))):
        losses = make_losses(ObjectiveConfig(objective="spactor", spactor_normalisation=normalisation, **weights))
        terms = add_all(losses, case).values()
        expected = [w * s / n for w, s, n in zip((1, 10, 10), sums, divisors)]
        assert [term.item() for term in terms] == pytest.approx(expected, abs=1e-12)
        log = losses.summarise()
        assert log["total loss"] == pytest.approx(sum(expected))
        means = (log["mlm loss"], log["rtd loss"], log["lm loss"])  # per token, whatever is trained
        assert means == pytest.approx([s / n for s, n in zip(sums, (5, 17, 5))])
        # Spans stand at no position that could have been replaced.
        assert set(log) == METRO_NAMES - {"replaced accuracy", "unreplaced accuracy"}


def test_an_encoder_without_an_lm_head_writes_nothing():
    losses, case = make_losses(ObjectiveConfig(objective="electra"), has_lm_head=False, targets=0), make_case()
    losses.add_mlm(case.mlm_nll, case.mlm_right, case.filled_wrong, case.valid)
    assert losses.add_rtd(*case.rtd).item() > 0
    log = losses.summarise()
    assert set(log) == METRO_NAMES - {"lm loss", "replaced accuracy", "unreplaced accuracy"}
    assert log["total loss"] == pytest.approx(log["mlm loss"] + 50 * log["rtd loss"])


def test_injection_carries_the_loss_scale():
    losses, weight = make_losses(scale=8.0), torch.ones(3, requires_grad=True)
    losses.inject(torch.zeros(2, requires_grad=True), weight.sum()).sum().backward()
    assert weight.grad.tolist() == [8.0] * 3
