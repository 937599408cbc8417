"""The loss terms of one step: computed where the heads are, over the counts of the global batch; what the log shows.

Objective = sum over terms of weight x S_term / C_term, with S summed and C counted over the GLOBAL batch (design
section 4); SPACTOR counts sequences in every term. The counts are known before the first forward pass, so every term is
multiplied by weight / C_term where it is computed; gradients are then sums over microbatches, replicas and copies, and
nothing divides them. Sums of raw terms, divided once at the end of the step, would be the same mathematics but overflow
FP16: 48 target tokens in a microbatch of a tiny model already push the dynamic loss scale from 2^24 down to 2^8.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_metro.batch import Microbatch
from megatron_metro.config.schema import ObjectiveConfig
from megatron_metro.config.terms import is_divided_by_sequences, target_kind
from megatron_metro.losses.injection import inject_loss
from megatron_metro.losses.rtd import count_rtd_hits, sum_rtd_loss

COUNT_NAMES = ("masked", "real", "targets", "sequences")
SUM_NAMES = (
    "mlm_loss",
    "mlm_right",
    "replaced",
    "rtd_loss",
    "lm_loss",
    "lm_replaced_right",
    "lm_unreplaced_right",
    "lm_unreplaced",
    "rtd_replaced_right",
    "rtd_unreplaced_right",
    "stop_votes",  # no loss: it rides on the one message to all ranks that every step has
)


def count_tokens(microbatches: Sequence[Microbatch]) -> Tensor:
    """Local counts of a step in the order of COUNT_NAMES, float64 [4]; the caller sums over data-parallel ranks."""
    device = microbatches[0].encoder_tokens.device
    total = torch.zeros(len(COUNT_NAMES), dtype=torch.float64, device=device)
    for batch in microbatches:
        size = torch.tensor(batch.encoder_tokens.numel(), device=device)
        total += torch.stack(
            [
                torch.zeros_like(size) if batch.masked_valid is None else batch.masked_valid.sum(),
                size if batch.encoder_padding is None else (~batch.encoder_padding).sum(),
                batch.target_valid.sum(),
                torch.tensor(batch.encoder_tokens.shape[0], device=device),
            ]
        )
    return total


class StepLosses:
    """Collects the terms of one step on one rank; heads add to it, wherever they are."""

    def __init__(
        self, objective: ObjectiveConfig, counts: Tensor, loss_scale: Tensor, *, has_lm_head: bool = True
    ) -> None:
        """`counts` are the global ones of `count_tokens`; `loss_scale` is FP16's, which injected losses need too."""
        self._objective, self._loss_scale, self._has_lm_head = objective, loss_scale, has_lm_head
        self._counts = dict(zip(COUNT_NAMES, counts.tolist(), strict=True))
        self.sums = torch.zeros(len(SUM_NAMES), dtype=torch.float64, device=counts.device)
        self._fetched: dict[str, float] | None = None

    def vote_to_stop(self) -> None:
        """Ask all ranks to stop after this step; call before the sums are reduced."""
        self._add(stop_votes=torch.ones((), device=self.sums.device))

    @property
    def is_voted_to_stop(self) -> bool:
        """Whether any rank asks for a stop; the same on all ranks once the sums are reduced."""
        return self._fetch()["stop_votes"] > 0

    @property
    def num_tokens(self) -> int:
        """Tokens the encoder reads in the global batch, padding excluded."""
        return int(self._counts["real"])

    def add_mlm(self, nll_BG: Tensor, is_right_BG: Tensor, is_replaced_BG: Tensor, valid_BG: Tensor) -> Tensor:
        """The generator's masked-LM term as a scalar to inject, from per-slot losses in nats; and what it replaced."""
        loss = (nll_BG * valid_BG).sum()
        self._add(mlm_loss=loss, mlm_right=(is_right_BG & valid_BG).sum(), replaced=(is_replaced_BG & valid_BG).sum())
        return loss * self._multiplier(self._objective.mlm_loss_weight, "masked")

    def add_rtd(self, logits: Tensor, is_replaced: Tensor, is_real: Tensor) -> Tensor:
        """The replaced-token-detection term of all positions as a scalar; logits of "replaced", all of one shape."""
        loss = sum_rtd_loss(logits, is_replaced, is_real)
        hits = count_rtd_hits(logits.detach(), is_replaced, is_real)
        self._add(
            rtd_loss=loss,
            rtd_replaced_right=hits.replaced_correct,
            rtd_unreplaced_right=hits.unreplaced_correct,
        )
        return loss * self._multiplier(self._objective.rtd_loss_weight, "real")

    def add_lm(self, nll_BM: Tensor, valid_BM: Tensor, replaced_prob_BM: Tensor | None) -> Tensor:
        """The decoder's LM term as the scalar that ends the chain, from per-slot losses in nats.

        With --weighted-lm-loss each token is weighed by its predicted replaced-probability (no gradient through it),
        while the count stays that of the tokens (reference section 4).
        """
        weights = valid_BM.to(nll_BM.dtype)
        if self._objective.weighted_lm_loss:
            assert replaced_prob_BM is not None, "--weighted-lm-loss needs an RTD head"
            weights = weights * replaced_prob_BM
        loss = (nll_BM * weights).sum()
        self._add(lm_loss=loss)
        return loss * self._multiplier(self._objective.lm_loss_weight, "targets")

    def record_lm(self, is_right: Tensor, is_replaced: Tensor, is_counted: Tensor) -> None:
        """The decoder's hits at replaced and unreplaced positions, bool tensors of one shape."""
        self._add(
            lm_replaced_right=(is_right & is_replaced & is_counted).sum(),
            lm_unreplaced_right=(is_right & ~is_replaced & is_counted).sum(),
            lm_unreplaced=(~is_replaced & is_counted).sum(),
        )

    def inject(self, activation: Tensor, loss: Tensor) -> Tensor:
        """`activation` unchanged; its backward pass also starts `loss`'s, as if the loss stood at the chain's end."""
        return inject_loss(activation, loss, self._loss_scale)

    @staticmethod
    def merge(parts: Sequence["StepLosses"]) -> "StepLosses":
        """The terms of several steps together: summed sums over summed counts."""
        first = parts[0]
        counts = torch.stack([torch.tensor(list(part._counts.values()), dtype=torch.float64) for part in parts])
        counts = counts.sum(0).to(first.sums.device)
        merged = StepLosses(first._objective, counts, first._loss_scale, has_lm_head=first._has_lm_head)
        merged.sums = torch.stack([part.sums for part in parts]).sum(0)
        return merged

    def summarise(self) -> dict[str, float]:
        """The log's numbers from globally reduced sums; losses in nats per token, accuracies and ratios in percent.

        What has a name depends on the run alone, except that a batch without masked tokens has no terms of a
        generator's. A ratio over nothing is 0, as is RTD without its head.
        """
        sums, counts = self._fetch(), self._counts
        objective, metrics = self._objective, {}
        total = sums["lm_loss"] * self._multiplier(objective.lm_loss_weight, "targets")
        if self._has_lm_head:
            metrics["lm loss"] = _ratio(sums["lm_loss"], counts["targets"])
        if counts["masked"] == 0:
            return {**metrics, "total loss": total}
        metrics["mlm loss"] = _ratio(sums["mlm_loss"], counts["masked"])
        metrics["rtd loss"] = _ratio(sums["rtd_loss"], counts["real"])
        total += sums["mlm_loss"] * self._multiplier(objective.mlm_loss_weight, "masked")
        total += sums["rtd_loss"] * self._multiplier(objective.rtd_loss_weight, "real")
        metrics |= {"total loss": total, "generator accuracy": 100 * _ratio(sums["mlm_right"], counts["masked"])}
        if self._has_lm_head and target_kind(objective) != "others":
            metrics["replaced accuracy"] = 100 * _ratio(sums["lm_replaced_right"], sums["replaced"])
            metrics["unreplaced accuracy"] = 100 * _ratio(sums["lm_unreplaced_right"], sums["lm_unreplaced"])
        num_unreplaced = counts["real"] - sums["replaced"]
        return {
            **metrics,
            "rtd replaced accuracy": 100 * _ratio(sums["rtd_replaced_right"], sums["replaced"]),
            "rtd unreplaced accuracy": 100 * _ratio(sums["rtd_unreplaced_right"], num_unreplaced),
            "replace ratio": 100 * _ratio(sums["replaced"], counts["real"]),
        }

    def _fetch(self) -> dict[str, float]:
        """The reduced sums on the host, which is waited for once."""
        if self._fetched is None:
            self._fetched = dict(zip(SUM_NAMES, self.sums.tolist(), strict=True))
        return self._fetched

    def _multiplier(self, weight: float, count: str) -> float:
        # A batch with nothing to write and nothing masked trains nothing, RTD neither (design section 4).
        if not (self._counts["targets"] or self._counts["masked"]):
            return 0.0
        return _ratio(weight, self._counts["sequences" if is_divided_by_sequences(self._objective) else count])

    @torch.no_grad()
    def _add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.sums[SUM_NAMES.index(name)] += value.detach()


def _ratio(total: float, count: float) -> float:
    return total / count if count else 0.0
