"""Heads: masked LM of the generator and replaced-token detection of the encoder.

Shape letters: r rows (a slot of a sequence each), h width, v the rank's columns of the vocabulary, s positions (the
rank's shard under sequence parallelism), b sequences.
"""

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter, functional

from megatron_metro.model.specs import LayerSpec
from megatron_metro.model.vocabulary import TokenMatrix


class Dense(MegatronModule):
    """A linear layer that every tensor-parallel rank holds whole."""

    def __init__(self, config: TransformerConfig, in_size: int, out_size: int, *, sees_shard: bool) -> None:
        super().__init__(config)
        device = torch.cuda.current_device()
        self.weight = Parameter(torch.empty(out_size, in_size, device=device, dtype=config.params_dtype))
        self.bias = Parameter(torch.empty(out_size, device=device, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel and sees_shard  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in_size] to [..., out_size]."""
        return functional.linear(hidden, self.weight, self.bias)


class MlmHead(MegatronModule):
    """Generator head up to the tied projection: dense, ReLU, norm, and an output bias (reference section 1.7).

    It runs on gathered slots, which all tensor-parallel ranks hold alike.
    """

    def __init__(
        self, config: TransformerConfig, spec: LayerSpec, kind: str, local_vocab: int, tp_group: object
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        if kind == "roberta":
            self.dense = Dense(config, config.hidden_size, config.hidden_size, sees_shard=False)
            self.norm = spec.norm(config, config.hidden_size, sees_shard=False)
        device = torch.cuda.current_device()
        self.output_bias = Parameter(torch.empty(local_vocab, device=device, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.output_bias, True, 0, 1)

    def forward(self, rows_RH: Tensor, word_embeddings: TokenMatrix) -> Tensor:
        """[r, h] hidden states at masked slots to [r, v] logits."""
        if hasattr(self, "dense"):
            rows_RH = self.norm(functional.relu(self.dense(rows_RH)))
        logits: Tensor = word_embeddings(rows_RH, project=True)
        return logits + self.output_bias


class RtdHead(MegatronModule):
    """One logit per encoder position: is this token a replacement? (reference section 1.7)"""

    def __init__(self, config: TransformerConfig, spec: LayerSpec, kind: str) -> None:
        super().__init__(config)
        if kind == "roberta":
            self.dense = Dense(config, config.hidden_size, config.hidden_size, sees_shard=True)
            self.norm = spec.norm(config, config.hidden_size)
        self.output = Dense(config, config.hidden_size, 1, sees_shard=True)

    def forward(self, hidden_SBH: Tensor) -> Tensor:
        """[s, b, h] to logits [s, b]."""
        if hasattr(self, "dense"):
            hidden_SBH = self.norm(functional.relu(self.dense(hidden_SBH)))
        return self.output(hidden_SBH).squeeze(-1)
