"""Objectives and ablations beside METRO, token by token from their definitions, on the networks of `ReferenceMetro`.

SPACTOR: equations 4 to 8 of its paper. ELECTRA and COCO-LM: an encoder alone. METRO's ablations: Table 4 of its paper.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_metro.batch import Microbatch
from megatron_metro.config.schema import ModelConfig, ObjectiveConfig
from tests.helpers.reference import ReferenceMetro


class ReferenceVariant:
    """A run's objective on one process; `total` carries the graph, `log` has the names of the training log."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        model: ModelConfig,
        objective: ObjectiveConfig,
        microbatches: Sequence[Microbatch],
        *,
        is_clean: bool = False,  # every fill is the original token
    ) -> None:
        self.weights, self.model, self.objective, self.is_clean = weights, model, objective, is_clean
        self.networks = ReferenceMetro(weights, model)
        self.losses: dict[str, list[Tensor]] = defaultdict(list)  # of single tokens
        self.hits: dict[str, list[bool]] = {"generator": [], "rtd replaced": [], "rtd unreplaced": []}
        self.counts: Counter[str] = Counter()
        self.writes = model.decoder_num_layers > 0 or model.encoder_lm_head
        if self.writes and objective.objective != "spactor":
            self.hits |= {"replaced": [], "unreplaced": []}
        for batch in microbatches:
            self._read(batch)
        self.total = self._sum_up()
        self.log = self._describe()

    def _read(self, batch: Microbatch) -> None:
        tokens, padding = batch.encoder_tokens, batch.encoder_padding
        corrupted = tokens.clone() if self.is_clean else self._corrupt(batch)
        memory = self.networks.encode("encoder", corrupted, padding)
        states = memory
        if self.model.decoder_num_layers:
            states = self.networks.decode(batch.decoder_tokens, batch.decoder_padding, memory, padding)
        verdicts = self.networks.detect(memory if self.model.rtd_position == "encoder" else states)
        self.counts["sequences"] += len(tokens)
        for row, column in self._list_real(batch):
            self._judge(verdicts[row, column], is_original=bool(corrupted[row, column] == tokens[row, column]))
        for row, slot in batch.target_valid.nonzero().tolist():
            if self.writes:
                probability = self._probability_of_replaced(verdicts, batch, row, slot)
                self._write(states, batch, corrupted, (row, slot), probability)

    def _corrupt(self, batch: Microbatch) -> Tensor:
        corrupted = batch.encoder_tokens.clone()
        logits, sampled = self.networks.fill(batch)
        for line, (row, slot) in zip(torch.log_softmax(logits, dim=-1), batch.masked_valid.nonzero().tolist()):
            original = int(batch.masked_ids[row, slot])
            self.losses["mlm"].append(-line[original])
            self.hits["generator"].append(int(line.argmax()) == original)
            corrupted[row, batch.masked_slots[row, slot]] = sampled[row, slot]
        return corrupted

    def _list_real(self, batch: Microbatch) -> list[list[int]]:
        if batch.encoder_padding is None:
            return [[b, i] for b in range(len(batch.encoder_tokens)) for i in range(batch.encoder_tokens.shape[1])]
        return (~batch.encoder_padding).nonzero().tolist()

    def _judge(self, z: Tensor, *, is_original: bool) -> None:
        """SPACTOR's head gives the probability that a token is original, all others' that it is replaced."""
        says_original = torch.sigmoid(z) if self.objective.objective == "spactor" else 1 - torch.sigmoid(z)
        self.losses["rtd"].append(-torch.log(says_original if is_original else 1 - says_original))
        self.hits["rtd unreplaced" if is_original else "rtd replaced"].append(bool(says_original > 0.5) == is_original)

    def _probability_of_replaced(self, verdicts: Tensor, batch: Microbatch, row: int, slot: int) -> Tensor | float:
        """As the RTD head, which the LM loss does not train, says of the token in a target's place."""
        if not (self.objective.weighted_lm_loss or self.model.copy_mechanism):
            return 1.0
        slots = batch.target_slots if self.model.rtd_position == "decoder" else batch.masked_slots
        return torch.sigmoid(verdicts[row, slots[row, slot]].detach()).float().double()

    def _write(
        self, states: Tensor, batch: Microbatch, corrupted: Tensor, place: tuple[int, int], replaced: Tensor | float
    ) -> None:
        row, slot = place
        x, target = states[row, batch.target_slots[row, slot]], int(batch.target_ids[row, slot])
        probs = torch.softmax(self.networks.project(x), dim=-1)
        if self.objective.objective == "spactor":
            self.losses["lm"].append(-torch.log(probs[target]))
            return
        # A decoder of masked tokens alone writes the i-th masked token at position i.
        masked_only = self.objective.lm_targets == "masked-only"
        shown = int(corrupted[row, batch.masked_slots[row, slot] if masked_only else batch.target_slots[row, slot]])
        if self.model.copy_mechanism:
            probs = replaced * probs + (1 - replaced) * torch.eye(len(probs), dtype=probs.dtype)[shown]
        weight = replaced if self.objective.weighted_lm_loss else 1.0
        self.losses["lm"].append(-torch.log(probs[target]) * weight)
        self.hits["unreplaced" if shown == target else "replaced"].append(int(probs.argmax()) == target)

    def _sum_up(self) -> Tensor:
        weights = {
            "mlm": self.objective.mlm_loss_weight,
            "rtd": self.objective.rtd_loss_weight,
            "lm": self.objective.lm_loss_weight,
        }
        per_sequence = self.objective.objective == "spactor" and self.objective.spactor_normalisation == "sum"
        total = torch.zeros((), dtype=torch.float64)
        for name, losses in self.losses.items():
            divisor = self.counts["sequences"] if per_sequence else len(losses)
            total = total + weights[name] * torch.stack(losses).sum() / divisor
        return total

    def _describe(self) -> dict[str, float]:
        log = {
            f"{name} loss": float(torch.stack(losses).detach().sum()) / len(losses)
            for name, losses in self.losses.items()
        }
        log |= {f"{name} accuracy": 100 * sum(hits) / max(len(hits), 1) for name, hits in self.hits.items()}
        num_replaced, num_real = len(self.hits["rtd replaced"]), len(self.losses["rtd"])
        return log | {"replace ratio": 100 * num_replaced / num_real, "total loss": float(self.total.detach())}
