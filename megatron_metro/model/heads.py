"""Heads: masked LM of the generator, replaced-token detection, and what may stand around the LM head's matrix.

Shape letters: r rows (a slot of a sequence each), h width, v the rank's columns of the vocabulary, s positions (the
rank's shard under sequence parallelism), b sequences.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter, functional

from megatron_metro.config.network_sizes import rtd_head_width
from megatron_metro.config.schema import ModelConfig
from megatron_metro.model.dense import Dense
from megatron_metro.model.specs import LayerSpec
from megatron_metro.model.vocabulary import TokenMatrix
from megatron_metro.parallel.vocab_ops import VocabShard


class MlmHead(MegatronModule):
    """Generator head to logits: dense, ReLU and norm (reference section 1.7), or nothing; a vocabulary matrix; a bias.

    The matrix is the model's, which a generator of another width is projected to (by the dense layer where there is
    one, as ELECTRA does), or the head's own. It runs on gathered slots, which all tensor-parallel ranks hold alike.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: LayerSpec,
        model: ModelConfig,
        shard: VocabShard,
        collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.tp_group = collection.tp
        width = config.hidden_size if model.untie_mlm_head else model.hidden_size
        # As before the LM head: T5's token matrix has entries of size 1.
        self.scale = width**-0.5 if model.scale_lm_output and not model.untie_mlm_head else 1.0
        if model.mlm_head == "roberta":
            self.dense = Dense(config, config.hidden_size, width, sees_shard=False)
            self.norm = spec.norm(config, width, sees_shard=False)
        elif width != config.hidden_size:
            self.projection = Dense(config, config.hidden_size, width, sees_shard=False, has_bias=False)
        if model.untie_mlm_head:
            self.output = TokenMatrix(config, shard, collection)
        device = torch.cuda.current_device()
        self.output_bias = Parameter(torch.empty(shard.num_columns, device=device, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.output_bias, True, 0, 1)

    def forward(self, rows_RH: Tensor, word_embeddings: TokenMatrix) -> Tensor:
        """[r, h] hidden states at masked slots to [r, v] logits."""
        if hasattr(self, "dense"):
            rows_RH = self.norm(functional.relu(self.dense(rows_RH)))
        if hasattr(self, "projection"):
            rows_RH = self.projection(rows_RH)
        matrix = self.output if hasattr(self, "output") else word_embeddings
        logits: Tensor = matrix(rows_RH * self.scale, project=True)
        return logits + self.output_bias


class LmTransform(MegatronModule):
    """What stands around the LM head's matrix: a bias after it and, with `has_dense`, dense, ReLU and norm before it.

    The bias alone makes it Megatron-LM's T5 head. With the dense layer it is written as the generator's head is
    (reference section 1.7), for the METRO paper's ablation of its LM head.
    """

    def __init__(self, config: TransformerConfig, spec: LayerSpec, shard: VocabShard, *, has_dense: bool) -> None:
        super().__init__(config)
        if has_dense:
            self.dense = Dense(config, config.hidden_size, config.hidden_size, sees_shard=False)
            self.norm = spec.norm(config, config.hidden_size, sees_shard=False)
        device = torch.cuda.current_device()
        self.output_bias = Parameter(torch.empty(shard.num_columns, device=device, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.output_bias, True, 0, 1)

    def forward(self, rows_RH: Tensor, matrix: TokenMatrix) -> Tensor:
        """[r, h] hidden states at target slots to [r, v] logits."""
        if hasattr(self, "dense"):
            rows_RH = self.norm(functional.relu(self.dense(rows_RH)))
        logits: Tensor = matrix(rows_RH, project=True)
        return logits + self.output_bias


class RtdHead(MegatronModule):
    """One logit per position of the encoder or decoder: is this token a replacement?

    METRO's heads are in reference section 1.7; "gelu" is SPACTOR's, a dense layer of its own width and GELU.
    """

    def __init__(self, config: TransformerConfig, spec: LayerSpec, model: ModelConfig) -> None:
        super().__init__(config)
        width = rtd_head_width(model)
        if model.rtd_head != "simple":
            self.dense = Dense(config, config.hidden_size, width, sees_shard=True)
        if model.rtd_head == "roberta":
            self.norm = spec.norm(config, width)
        self.output = Dense(config, width, 1, sees_shard=True)

    def forward(self, hidden_SBH: Tensor) -> Tensor:
        """[s, b, h] to logits [s, b]."""
        if hasattr(self, "norm"):
            hidden_SBH = self.norm(functional.relu(self.dense(hidden_SBH)))
        elif hasattr(self, "dense"):
            hidden_SBH = functional.gelu(self.dense(hidden_SBH))
        return self.output(hidden_SBH).squeeze(-1)
