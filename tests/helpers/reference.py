"""METRO in plain PyTorch, written from the formulas of the reference (sections 1.2-1.7 and 4): the tests' oracle.

It shares no code with the model under test: no megatron, one process, no slots of static length inside the networks,
whole-vocabulary softmaxes. Weights come as a dictionary under the canonical checkpoint names, in any dtype.
Shape letters: b sequences, s query positions, k key positions, h width, n heads, d head size, g slots, v vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megatron_metro.batch import Microbatch
from megatron_metro.config.schema import ModelConfig, ObjectiveConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceStep:
    """The result of a global batch; `total` carries the graph of the objective."""

    total: Tensor
    log: dict[str, float]  # the fixed names of the training log
    sampled_ids: list[Tensor]  # [b, g] of each microbatch, 0 at unused slots
    corrupted: list[Tensor]  # [b, s] of each microbatch


@dataclass(frozen=True, kw_only=True, slots=True)
class _Terms:
    """Summed losses (with graph) and hits of one microbatch."""

    sums: dict[str, Tensor]
    counts: dict[str, int]
    sampled_ids: Tensor | None
    corrupted: Tensor


class ReferenceMetro:
    """Post-LN METRO, or its main model alone where the configuration has no generator. Dropout is 0."""

    def __init__(self, weights: Mapping[str, Tensor], model: ModelConfig, *, pad_id: int = 1) -> None:
        assert model.norm_placement == "post" and model.activation == "relu" and model.vocab_size is not None
        assert model.relative_attention_bucket == "metro"
        self.weights, self.model, self.pad_id = weights, model, pad_id
        self.vocab = weights["word_embeddings.weight"][: model.vocab_size]  # without padded rows
        self.shares_positions = model.generator_embedding_sharing == "token_pos_norm"

    def run(self, microbatches: Sequence[Microbatch], objective: ObjectiveConfig | None = None) -> ReferenceStep:
        """Objective of the global batch: weighted means over all masked, target and non-pad tokens together."""
        objective = objective or ObjectiveConfig()
        parts = [self._run_microbatch(microbatch, objective) for microbatch in microbatches]
        sums = {name: torch.stack([part.sums[name] for part in parts]).sum() for name in parts[0].sums}
        counts = {name: sum(part.counts[name] for part in parts) for name in parts[0].counts}
        terms = {"lm loss": (sums["lm"], counts["targets"], objective.lm_loss_weight)}
        if "mlm" in sums:
            terms["mlm loss"] = (sums["mlm"], counts["masked"], objective.mlm_loss_weight)
        if "rtd" in sums:
            terms["rtd loss"] = (sums["rtd"], counts["real"], objective.rtd_loss_weight)
        total = sum((weight * s / n for s, n, weight in terms.values() if n), torch.zeros_like(sums["lm"]))
        log = {name: _ratio(float(s.detach()), n) for name, (s, n, _) in terms.items()}
        log["total loss"] = float(total.detach())
        return ReferenceStep(
            total=total,
            log=log | _percentages(counts),
            sampled_ids=[part.sampled_ids for part in parts if part.sampled_ids is not None],
            corrupted=[part.corrupted for part in parts],
        )

    def _run_microbatch(self, batch: Microbatch, objective: ObjectiveConfig) -> _Terms:
        tokens, padding = batch.encoder_tokens, batch.encoder_padding
        is_real = torch.ones_like(tokens, dtype=torch.bool) if padding is None else ~padding
        sums: dict[str, Tensor] = {}
        counts = {"real": int(is_real.sum()), "targets": int(batch.target_valid.sum())}
        sampled, corrupted = None, tokens
        if self.model.has_generator:
            originals = batch.masked_ids[batch.masked_valid]
            logits, sampled = self.fill(batch)
            sums["mlm"] = functional.cross_entropy(logits, originals, reduction="sum")
            counts |= {"masked": len(originals), "mlm_right": int((logits.argmax(-1) == originals).sum())}
            corrupted = tokens.clone()
            corrupted[_places(batch.masked_slots, batch.masked_valid)] = sampled[batch.masked_valid]
        memory, is_replaced, z = self.encode("encoder", corrupted, padding), corrupted != tokens, None
        if self.model.has_rtd_head:
            z = self.detect(memory)
            labels = is_replaced.to(z.dtype)
            sums["rtd"] = functional.binary_cross_entropy_with_logits(z[is_real], labels[is_real], reduction="sum")
            counts["rtd_replaced_right"] = int((z >= 0)[is_real & is_replaced].sum())
            counts["rtd_unreplaced_right"] = int((z < 0)[is_real & ~is_replaced].sum())
        places, targets = _places(batch.target_slots, batch.target_valid), batch.target_ids[batch.target_valid]
        states = self.decode(batch.decoder_tokens, batch.decoder_padding, memory, padding)
        logits = self.project(states[places])
        nll = functional.cross_entropy(logits, targets, reduction="none")
        if objective.weighted_lm_loss:
            assert z is not None
            # The weight crosses pipeline stages as FP32 whatever the dtype of the model.
            nll = nll * z.detach()[places].sigmoid().float().to(nll.dtype)
        sums["lm"] = nll.sum()
        if self.model.has_generator:
            right, replaced = logits.argmax(-1) == targets, is_replaced[places]
            counts |= {"replaced": int(replaced.sum()), "unreplaced_slots": int((~replaced).sum())}
            counts |= {"replaced_right": int(right[replaced].sum()), "unreplaced_right": int(right[~replaced].sum())}
        return _Terms(sums=sums, counts=counts, sampled_ids=sampled, corrupted=corrupted)

    def fill(self, batch: Microbatch) -> tuple[Tensor, Tensor]:
        """Generator logits at the masked positions [M, v], and one draw per position by inverse CDF [b, g]."""
        hidden = self.encode("generator", batch.generator_tokens, batch.encoder_padding)
        x = hidden[_places(batch.masked_slots, batch.masked_valid)]
        if self.model.mlm_head == "roberta":
            x = self._norm("mlm_head.norm", functional.relu(self._linear("mlm_head.dense", x)))
        elif "mlm_head.projection.weight" in self.weights:
            x = self._linear("mlm_head.projection", x)
        matrix = self.weights["mlm_head.output.weight"] if self.model.untie_mlm_head else self.vocab
        logits = x @ matrix[: self.model.vocab_size].t() + self.weights["mlm_head.output_bias"][: self.model.vocab_size]
        allowed = logits.detach().double().clone()
        allowed[:, self.pad_id] = -math.inf
        cumulative = torch.softmax(allowed, dim=-1).cumsum(dim=-1)
        threshold = batch.uniforms[batch.masked_valid][:, None] * cumulative[:, -1:]
        sampled = torch.zeros_like(batch.masked_ids)
        sampled[batch.masked_valid] = (cumulative <= threshold).sum(dim=-1)
        return logits, sampled

    def detect(self, memory: Tensor) -> Tensor:
        """Replaced-token logits [b, s]."""
        if self.model.rtd_head == "roberta":
            memory = self._norm("rtd_head.norm", functional.relu(self._linear("rtd_head.dense", memory)))
        elif self.model.rtd_head == "gelu":
            inner = self._linear("rtd_head.dense", memory)
            memory = inner * 0.5 * (1.0 + torch.erf(inner / math.sqrt(2.0)))
        return self._linear("rtd_head.output", memory).squeeze(-1)

    def encode(self, network: str, tokens: Tensor, padding: Tensor | None) -> Tensor:
        """Hidden states [b, s, h] of generator or encoder after its last layer."""
        x = self._embed("encoder" if network == "generator" and self.shares_positions else network, tokens, padding)
        if padding is not None:
            x = torch.where(padding[..., None], 0.0, x)
        if network == "generator" and "generator.embedding_projection.weight" in self.weights:
            x = self._linear("generator.embedding_projection", x)
        depth = self.model.generator_num_layers if network == "generator" else self.model.encoder_num_layers
        for i in range(depth):
            prefix = f"{network}.layers.{i}"
            x = self._self_attention(prefix, x, self._bias(network, i, tokens.shape[1]), padding, is_causal=False)
            x = self._feed_forward(prefix, x)
        return x

    def decode(self, tokens: Tensor, padding: Tensor | None, memory: Tensor, memory_padding: Tensor | None) -> Tensor:
        """Hidden states [b, t, h] after the decoder's last layer."""
        x = self._embed("decoder", tokens, padding)
        for i in range(self.model.decoder_num_layers):
            prefix = f"decoder.layers.{i}"
            bias = self._bias("decoder", i, tokens.shape[1]) if self.model.relative_attention_decoder else None
            x = self._self_attention(prefix, x, bias, None, is_causal=True)
            x = self._cross_attention(prefix, x, memory, memory_padding)
            x = self._feed_forward(prefix, x)
        return x

    def project(self, x: Tensor) -> Tensor:
        """The LM head's logits [..., v]."""
        head = self.weights["lm_head.weight"] if self.model.untie_embeddings_and_output_weights else self.vocab
        if self.model.lm_head == "linear":
            return x @ head[: self.model.vocab_size].t()
        if self.model.lm_head == "roberta":
            x = self._norm("lm_transform.norm", functional.relu(self._linear("lm_transform.dense", x)))
        return x @ head[: self.model.vocab_size].t() + self.weights["lm_transform.output_bias"][: self.model.vocab_size]

    def _embed(self, network: str, tokens: Tensor, padding: Tensor | None) -> Tensor:
        """LN(E[token] + P[position]); real positions count from row 2, padding reads row 1."""
        is_real = torch.ones_like(tokens, dtype=torch.bool) if padding is None else ~padding
        rows = torch.where(is_real, 1 + is_real.long().cumsum(dim=1), 1)
        x = self.vocab[tokens]
        if self.model.position_embedding_type == "learned_absolute":
            x = x + self.weights[f"{network}.position_embeddings.weight"][rows]
        return self._norm(f"{network}.embedding_norm", x)

    def _self_attention(
        self, prefix: str, x: Tensor, bias: Tensor | None, padding: Tensor | None, *, is_causal: bool
    ) -> Tensor:
        name = f"{prefix}.self_attention"
        query, key, value = self._heads(f"{name}.linear_qkv", x, 3)
        scores = self._scores(query, key, padding)
        if bias is not None:
            scores = scores + bias
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
        return self._norm(f"{name}_norm", x + self._output(f"{name}.linear_proj", scores, value))

    def _cross_attention(self, prefix: str, x: Tensor, memory: Tensor, padding: Tensor | None) -> Tensor:
        name = f"{prefix}.cross_attention"
        (query,) = self._heads(f"{name}.linear_q", x, 1)
        key, value = self._heads(f"{name}.linear_kv", memory, 2)
        return self._norm(
            f"{name}_norm", x + self._output(f"{name}.linear_proj", self._scores(query, key, padding), value)
        )

    def _feed_forward(self, prefix: str, x: Tensor) -> Tensor:
        inner = functional.relu(self._linear(f"{prefix}.mlp.linear_fc1", x))
        return self._norm(f"{prefix}.mlp_norm", x + self._linear(f"{prefix}.mlp.linear_fc2", inner))

    def _heads(self, name: str, x: Tensor, parts: int) -> Sequence[Tensor]:
        """`parts` projections [b, n, s, d] from one matrix whose rows are, head by head, those of each part."""
        b, s, _ = x.shape
        num_heads = self.model.num_attention_heads
        if name.startswith("generator."):
            num_heads = self.model.generator_num_attention_heads or num_heads
        split = self._linear(name, x).view(b, s, num_heads, parts, -1)
        return split.permute(3, 0, 2, 1, 4).unbind(0)

    def _scores(self, query: Tensor, key: Tensor, padding: Tensor | None) -> Tensor:
        scale = self.model.softmax_scale if self.model.softmax_scale is not None else query.shape[-1] ** -0.5
        scores = (query * scale) @ key.transpose(-1, -2)
        return scores if padding is None else scores.masked_fill(padding[:, None, None, :], -math.inf)

    def _output(self, name: str, scores: Tensor, value: Tensor) -> Tensor:
        return self._linear(name, (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).flatten(2))

    def _bias(self, network: str, layer: int, length: int) -> Tensor | None:
        """Relative bias [n, s, s] of self-attention, unscaled."""
        if self.model.relative_attention == "none":
            return None
        stack = f"{network}.layers.{layer}" if self.model.relative_attention == "per_layer" else network
        positions = range(length)
        buckets = [[self._bucket(k - q) for k in positions] for q in positions]
        return self.weights[f"{stack}.relative_bias.weight"][torch.tensor(buckets)].permute(2, 0, 1)

    def _bucket(self, offset: int) -> int:
        half, distance = self.model.relative_attention_num_buckets // 2, abs(offset)
        exact, farthest = half // 2, self.model.relative_attention_max_distance - 1
        if distance >= exact:
            share = math.log(distance / exact) / math.log(farthest / exact)
            distance = min(half - 1, exact + math.ceil(share * (half - 1 - exact)))
        return half - 1 + (distance if offset > 0 else -distance)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """LayerNorm from its definition."""
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + self.model.norm_epsilon).rsqrt()
        return centred * scale * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def _places(slots_BG: Tensor, valid_BG: Tensor) -> tuple[Tensor, Tensor]:
    """Row and position of every used slot, in the order of the slots."""
    rows, _ = valid_BG.nonzero(as_tuple=True)
    return rows, slots_BG[valid_BG]


def _ratio(total: float, count: int) -> float:
    return total / count if count else 0.0


def _percentages(counts: Mapping[str, int]) -> dict[str, float]:
    if "masked" not in counts:
        return {}
    shares = {
        "generator accuracy": ("mlm_right", counts["masked"]),
        "replaced accuracy": ("replaced_right", counts["replaced"]),
        "unreplaced accuracy": ("unreplaced_right", counts["unreplaced_slots"]),
        "replace ratio": ("replaced", counts["real"]),
    }
    if "rtd_replaced_right" in counts:
        shares["rtd replaced accuracy"] = ("rtd_replaced_right", counts["replaced"])
        shares["rtd unreplaced accuracy"] = ("rtd_unreplaced_right", counts["real"] - counts["replaced"])
    return {name: 100 * _ratio(counts[numerator], count) for name, (numerator, count) in shares.items()}
