"""From our configuration to megatron-core's: one TransformerConfig per network of the chain."""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_metro.config.chain import Network
from megatron_metro.config.network_sizes import network_sizes
from megatron_metro.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gated-gelu": partial(functional.gelu, approximate="tanh"),  # as T5 v1.1 was trained
}


def parameter_dtype(optimizer: OptimizerConfig) -> torch.dtype:
    """dtype of weights, activations and pipeline messages."""
    if optimizer.bf16:
        return torch.bfloat16
    return torch.float16 if optimizer.fp16 else torch.float32


def build_transformer_configs(run: RunConfig, dtype: torch.dtype) -> dict[Network, TransformerConfig]:
    """One megatron-core configuration per network that exists.

    `dtype` is a separate argument because tests run the same configuration in float64.
    """
    depths: dict[Network, int] = {
        "generator": run.model.generator_num_layers,
        "encoder": run.model.encoder_num_layers,
        "decoder": run.model.decoder_num_layers,
    }
    return {
        network: TransformerConfig(
            num_layers=num_layers,
            **_architecture(run.model, network),
            **_precision(run, dtype),
            **_parallelism(run.parallel, dtype),
        )
        for network, num_layers in depths.items()
        if num_layers > 0
    }


def _architecture(model: ModelConfig, network: Network) -> dict[str, object]:
    is_generator, sizes = network == "generator", network_sizes(model, network)
    return {
        "hidden_size": sizes.hidden_size,
        "ffn_hidden_size": sizes.ffn_hidden_size,
        "num_attention_heads": sizes.num_attention_heads,
        "kv_channels": sizes.head_size,
        "softmax_scale": model.softmax_scale,
        "hidden_dropout": model.generator_dropout if is_generator else model.hidden_dropout,
        "attention_dropout": model.generator_dropout if is_generator else model.attention_dropout,
        "normalization": model.normalization,
        "layernorm_epsilon": model.norm_epsilon,
        "add_bias_linear": model.add_bias_linear,
        "gated_linear_unit": model.activation == "gated-gelu",
        "activation_func": ACTIVATIONS[model.activation],
        # Weights come from initialisation.py, as a function of name and shape that no layout changes.
        "perform_initialization": False,
    }


def _precision(run: RunConfig, dtype: torch.dtype) -> dict[str, object]:
    return {
        "params_dtype": dtype,
        "bf16": run.optimizer.bf16,
        "fp16": run.optimizer.fp16,
        "deterministic_mode": run.training.deterministic_mode,
        # The step divides by the global number of tokens once; core divides by nothing (design section 4).
        "calculate_per_token_loss": True,
    }


def _parallelism(parallel: ParallelConfig, dtype: torch.dtype) -> dict[str, object]:
    pipelined = parallel.pipeline_model_parallel_size > 1
    interleaved = parallel.num_virtual_stages_per_pipeline_rank > 1
    overlap_p2p = interleaved and parallel.overlap_p2p_communication
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": (
            parallel.num_virtual_stages_per_pipeline_rank if interleaved else None
        ),
        "microbatch_group_size_per_vp_stage": parallel.pipeline_model_parallel_size if interleaved else None,
        "sequence_parallel": parallel.sequence_parallel,
        "pipeline_dtype": dtype if pipelined else None,
        "overlap_p2p_comm": overlap_p2p,
        "batch_p2p_comm": not overlap_p2p,
        "batch_p2p_sync": False,  # torch has long ordered batched messages itself; core would stop the device
        "deallocate_pipeline_outputs": pipelined and parallel.deallocate_pipeline_outputs,
        # Boundaries differ in shape, so core must ask; our communicator answers from a table without messages.
        "variable_seq_lengths": pipelined,
        # Core couples variable lengths to a mixture-of-experts option that is otherwise unused here.
        "moe_token_dispatcher_type": "alltoall",
    }
