"""What a piece of the chain holds, and how tokens and hidden states pass through it: weights in, no order of units.

Shape letters: s encoder or decoder positions (shards under sequence parallelism), b sequences, h width, m slots, r rows
(a slot of a sequence each), v the rank's columns of the vocabulary.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_metro.batch import Microbatch
from megatron_metro.config.chain import Network, Unit
from megatron_metro.config.schema import ModelConfig
from megatron_metro.config.terms import TargetKind
from megatron_metro.losses.copying import prefers_input
from megatron_metro.model.heads import LmTransform, MlmHead, RtdHead
from megatron_metro.model.network import NetworkPlan, NetworkShare
from megatron_metro.model.sharded_state import shard_parameters
from megatron_metro.model.slots import gather_shortened, gather_slots
from megatron_metro.model.specs import LayerSpec
from megatron_metro.model.vocabulary import TokenMatrix
from megatron_metro.parallel import vocab_ops
from megatron_metro.parallel.vocab_ops import VocabShard, VocabStatistics


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceContext:
    """What all pieces of a model have in common."""

    model: ModelConfig
    configs: dict[Network, TransformerConfig]
    spec: LayerSpec
    shard: VocabShard
    collection: ProcessGroupCollection
    recompute: bool  # full recomputation of every layer
    pad_id: int
    target_kind: TargetKind  # what the LM head's targets stand for
    logit_means_original: bool  # the RTD head's, rather than "replaced"
    eval_all_positions: bool  # validation scores the decoder at every position, as the reference reports


class PieceModules(MegatronModule):
    """The modules of a piece, named as in the whole model."""

    def __init__(self, context: PieceContext, units: tuple[Unit, ...]) -> None:
        super().__init__(context.configs["encoder"])
        self.context, self.units = context, units
        self.tp_group = context.collection.tp
        kinds = {unit.kind for unit in units}
        model = context.model
        readers = {"generator_embedding", "mlm_head", "encoder_embedding", "decoder_embedding"}
        if kinds & readers or ("lm_head" in kinds and not model.untie_embeddings_and_output_weights):
            self.word_embeddings = TokenMatrix(self.config, context.shard, context.collection)
        for network in context.configs:
            if share := self._build_share(network):
                self.add_module(network, share)
        if "mlm_head" in kinds:
            config = context.configs["generator"]
            self.mlm_head = MlmHead(config, context.spec, model, context.shard, context.collection)
        if model.has_rtd_head and ("encoder_head" if model.has_encoder_rtd_head else "lm_head") in kinds:
            self.rtd_head = RtdHead(self.config, context.spec, model)
        if "lm_head" in kinds:
            self._build_lm_head()

    def _build_lm_head(self) -> None:
        context, model = self.context, self.context.model
        if model.untie_embeddings_and_output_weights:
            self.lm_head = TokenMatrix(self.config, context.shard, context.collection)
        if model.lm_head != "linear":
            has_dense = model.lm_head == "roberta"
            self.lm_transform = LmTransform(self.config, context.spec, context.shard, has_dense=has_dense)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[()] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensor | ShardedTensorFactory]:
        """Every weight under its name in the whole model, which no layout changes."""
        return shard_parameters(self, prefix, self.context.model, self.context.shard, self.context.collection)

    def _rows_at(self, hidden: Tensor, slots_BM: Tensor, is_short: bool) -> Tensor:
        """What a head projects: hidden states [b*m, h] at slots, alike on all tensor-parallel ranks."""
        gather = gather_shortened if is_short else partial(gather_slots, slots_BM=slots_BM)
        rows_MBH: Tensor = gather(hidden, config=self.config, tp_group=self.tp_group)
        return rows_MBH.transpose(0, 1).flatten(0, 1)

    def _project(self, rows_RH: Tensor) -> Tensor:
        """The LM head's logits [r, v]."""
        matrix: TokenMatrix = self.lm_head if hasattr(self, "lm_head") else self.word_embeddings
        if hasattr(self, "lm_transform"):
            logits: Tensor = self.lm_transform(rows_RH, matrix)
        else:
            scale = self.config.hidden_size**-0.5 if self.context.model.scale_lm_output else 1.0
            logits = matrix(rows_RH * scale, project=True)
        return logits

    def judge(self, hidden_SBH: Tensor) -> Tensor:
        """Logits [s, b] of "replaced" at the positions of this rank."""
        logits: Tensor = self.rtd_head(hidden_SBH)
        return -logits if self.context.logit_means_original else logits

    def _predict(self, rows_RH: Tensor, inputs_R: Tensor | None, replaced_prob_R: Tensor | None) -> Tensor:
        """The LM head's most likely ids [r]; `inputs_R` are those that the copy mechanism may copy.

        Its verdicts are RTD's of the encoder, or None: then the RTD head reads the rows too.
        """
        logits, shard = self._project(rows_RH), self.context.shard
        if not self.context.model.copy_mechanism or inputs_R is None:
            return vocab_ops.argmax(logits, shard)
        if replaced_prob_R is None:
            replaced_prob_R = self.judge(rows_RH[:, None]).squeeze(1).sigmoid()
        return self._pick(logits, vocab_ops.measure(logits, shard), inputs_R, replaced_prob_R)

    def _pick(
        self, logits_RV: Tensor, statistics: VocabStatistics, inputs_R: Tensor, replaced_prob_R: Tensor
    ) -> Tensor:
        """The most likely ids [r] under the copy mechanism."""
        best_R, shard = statistics.argmax_N, self.context.shard
        best_log_prob_R = vocab_ops.log_probabilities(logits_RV, best_R, shard, statistics)
        input_log_prob_R = vocab_ops.log_probabilities(logits_RV, inputs_R, shard, statistics)
        return torch.where(prefers_input(best_log_prob_R, input_log_prob_R, replaced_prob_R), inputs_R, best_R)

    def _stack_bias(self, network: Network, microbatch: Microbatch) -> Tensor | None:
        share: NetworkShare | None = getattr(self, network, None)
        shape = microbatch.shape
        length = shape.decoder_length if network == "decoder" else shape.encoder_length
        return share.stack_bias(length) if share is not None else None

    def _embed(
        self,
        share: NetworkShare,
        tokens_BS: Tensor,
        padding: Tensor | None,
        dropout: float,
        start: int = 0,
        segments: Tensor | None = None,
    ) -> Tensor:
        return share.embed(self.word_embeddings(tokens_BS), tokens_BS.shape[1], padding, dropout, start, segments)

    def _build_share(self, network: Network) -> NetworkShare | None:
        kinds = {unit.kind for unit in self.units}
        embeds = {
            "generator": "generator_embedding" in kinds and self.context.model.generator_embedding_sharing == "token",
            "encoder": bool(kinds & {"mlm_head", "encoder_embedding"})
            or ("generator_embedding" in kinds and self.context.model.generator_embedding_sharing == "token_pos_norm"),
            "decoder": "decoder_embedding" in kinds,
        }[network]
        plan = NetworkPlan(
            network=network,
            layers=tuple(u.index for u in self.units if u.kind == f"{network}_layer" and u.index is not None),
            embeds=embeds,
            projects=network == "generator" and "generator_embedding" in kinds,
            ends={"generator": "mlm_head", "encoder": "encoder_head", "decoder": "lm_head"}[network] in kinds,
            recompute=self.context.recompute,
        )
        if not (plan.layers or plan.embeds or plan.projects or plan.ends):
            return None
        config = self.context.configs[network]
        return NetworkShare(config, self.context.model, self.context.spec, plan, self.context.collection)
