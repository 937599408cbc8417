"""Which modules a layer is made of, one function per back end."""

from dataclasses import dataclass
from functools import partial

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import CrossAttentionSubmodules, SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_metro.model.attention import BiasedAttention, QkvLinear, SlotSelfAttention, SourceAttention
from megatron_metro.model.dense import DroppingLinear
from megatron_metro.model.norm import Norm


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """The parts of one transformer layer, ready for megatron-core's `build_module`."""

    self_attention: ModuleSpec
    cross_attention: ModuleSpec
    mlp: ModuleSpec
    norm: type[Norm]


def local_spec(recompute_scores: bool, drops_activations: bool) -> LayerSpec:
    """Pure PyTorch parts: run on CPU, and on CUDA without Transformer Engine."""
    second_linear = DroppingLinear if drops_activations else RowParallelLinear
    attention = partial(BiasedAttention, recompute_scores=recompute_scores)
    return LayerSpec(
        self_attention=ModuleSpec(
            module=SlotSelfAttention,
            submodules=SelfAttentionSubmodules(
                linear_qkv=QkvLinear, core_attention=attention, linear_proj=RowParallelLinear
            ),
        ),
        cross_attention=ModuleSpec(
            module=SourceAttention,
            submodules=CrossAttentionSubmodules(
                linear_q=ColumnParallelLinear,
                linear_kv=ColumnParallelLinear,
                core_attention=attention,
                linear_proj=RowParallelLinear,
            ),
        ),
        mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=second_linear)),
        norm=Norm,
    )
