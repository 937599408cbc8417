"""megatron-core's own T5, as Megatron-LM trains it: what a converted checkpoint of it is compared with."""

import torch
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec, encoder_model_with_local_spec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_metro.config.schema import ModelConfig
from megatron_metro.model.transformer_config import ACTIVATIONS
from megatron_metro.parallel.groups import ParallelGroups


def build_core_t5(model: ModelConfig, groups: ParallelGroups) -> T5Model:
    """A T5 with core's own initial weights, FP32 and evaluation mode, in one process."""

    def configure(num_layers: int) -> TransformerConfig:
        return TransformerConfig(
            num_layers=num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            kv_channels=model.head_size,
            activation_func=ACTIVATIONS[model.activation],
            layernorm_epsilon=model.norm_epsilon,
            use_cpu_initialization=True,
        )

    depths = model.encoder_num_layers, model.decoder_num_layers
    # Core's own block specs leave the final norms out where there is no Transformer Engine.
    blocks = [
        TransformerBlockSubmodules([spec] * depth, layer_norm=WrappedTorchNorm)
        for spec, depth in zip((encoder_model_with_local_spec(), decoder_model_with_local_spec()), depths)
    ]
    core: T5Model = T5Model(
        config=configure(depths[1]),
        encoder_config=configure(depths[0]),
        transformer_encoder_layer_spec=blocks[0],
        transformer_decoder_layer_spec=blocks[1],
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_position_embeddings,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        pg_collection=groups.collection,
    )
    return core.eval()


def run_core_t5(core: T5Model, tokens_BS: Tensor, decoder_tokens_BT: Tensor) -> Tensor:
    """Ids [b, s] and [b, t] without padding to logits [b, t, v]."""
    (b, s), t = tokens_BS.shape, decoder_tokens_BT.shape[1]
    # True where a key must not be read; core wants whole matrices.
    everything, source = torch.zeros(b, 1, s, s, dtype=torch.bool), torch.zeros(b, 1, t, s, dtype=torch.bool)
    future = torch.ones(t, t, dtype=torch.bool).triu(1).expand(b, 1, t, t)
    logits: Tensor = core(tokens_BS, decoder_tokens_BT, everything, future, source)
    return logits
