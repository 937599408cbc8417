"""A chain of a few core layers, cut into pieces, whose weights and gradients are functions of name and step alone.

It holds every kind of sharding a real piece has: a padded vocabulary, a weight shared by the first and the last unit,
column- and row-parallel matrices, a gated projection, replicated norms. Gradients are put into `main_grad`, so updates
need no forward pass and are the same in every layout.
"""

import zlib
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_metro.device import activate
from megatron_metro.parallel.groups import ParallelGroups

HIDDEN, FFN = 6, 8
VOCAB_SIZE, PADDED_VOCAB_SIZE = 9, 12
NUM_LAYERS = 4
SHARED = "word_embeddings.weight"
# Shapes of the whole model's tensors, without padding.
SHAPES = {SHARED: (VOCAB_SIZE, HIDDEN)} | {
    f"layers.{layer}.{name}": shape
    for layer in range(NUM_LAYERS)
    for name, shape in {
        "norm.weight": (HIDDEN,),
        "norm.bias": (HIDDEN,),
        "gate.weight": (2 * FFN, HIDDEN),
        "up.weight": (FFN, HIDDEN),
        "up.bias": (FFN,),
        "down.weight": (HIDDEN, FFN),
        "down.bias": (HIDDEN,),
    }.items()
}


class TinyLayer(MegatronModule):
    """One replicated norm and three sharded matrices."""

    def __init__(self, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(HIDDEN, dtype=config.params_dtype)
        options = {"config": config, "init_method": nn.init.zeros_, "tp_group": tp_group}
        self.gate = ColumnParallelLinear(HIDDEN, 2 * FFN, bias=False, **options)
        self.up = ColumnParallelLinear(HIDDEN, FFN, **options)
        self.down = RowParallelLinear(FFN, HIDDEN, bias=True, input_is_parallel=True, skip_bias_add=True, **options)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state[f"{prefix}gate.weight"] = apply_swiglu_sharded_factory(state[f"{prefix}gate.weight"], sharded_offsets)
        return state


class TinyPiece(MegatronModule):
    """The given layers, and the embedding on the first and the last piece."""

    def __init__(
        self, config: TransformerConfig, groups: ParallelGroups, layers: tuple[int, ...], embedding_copy: int | None
    ) -> None:
        super().__init__(config)
        self.groups, self.embedding_copy = groups, embedding_copy
        if embedding_copy is not None:
            self.word_embeddings = VocabParallelEmbedding(
                PADDED_VOCAB_SIZE, HIDDEN, init_method=nn.init.zeros_, config=config, tp_group=groups.tp_group
            )
            self.word_embeddings.weight.shared_embedding = True
            if embedding_copy > 0:
                self.word_embeddings.weight.shared = True
        self.layers = nn.ModuleDict({str(layer): TinyLayer(config, groups.tp_group) for layer in layers})

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = {}
        for index, layer in self.layers.items():
            state |= layer.sharded_state_dict(f"{prefix}layers.{index}.", sharded_offsets, metadata)
        if self.embedding_copy is not None:
            weight = self.word_embeddings.weight
            start = self.groups.tp_rank * weight.shape[0]
            rows = max(0, min(VOCAB_SIZE - start, weight.shape[0]))
            if rows:
                state[f"{prefix}{SHARED}"] = ShardedTensor(
                    key=f"{prefix}{SHARED}",
                    data=weight[:rows],
                    dtype=weight.dtype,
                    local_shape=(rows, HIDDEN),
                    global_shape=(VOCAB_SIZE, HIDDEN),
                    global_offset=(start, 0),
                    axis_fragmentations=None,
                    replica_id=(self.embedding_copy, 0, self.groups.dp_rank),
                )
        return state


def build_pieces(groups: ParallelGroups, num_chunks: int, dtype: torch.dtype) -> list[TinyPiece]:
    """This rank's chunks; weights are those of step 0."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=4,
        kv_channels=2,
        tensor_model_parallel_size=groups.tp_size,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        calculate_per_token_loss=True,
    )
    activate("cpu").seed_all(1234, tp_rank=groups.tp_rank, pp_rank=groups.pp_rank, dp_rank=groups.dp_rank)
    num_pieces = groups.pp_size * num_chunks
    per_piece = NUM_LAYERS // num_pieces
    pieces = []
    for chunk in range(num_chunks):
        piece = chunk * groups.pp_size + groups.pp_rank
        layers = tuple(range(piece * per_piece, (piece + 1) * per_piece))
        copy = 0 if piece == 0 else 1 if piece == num_pieces - 1 else None
        pieces.append(TinyPiece(config, groups, layers, copy))
    for piece in pieces:
        for name, parameter in piece.named_parameters():
            parameter.data.copy_(local_part(full_tensor(name, 0), parameter, name, groups))
    return pieces


def full_tensor(name: str, step: int) -> Tensor:
    """The whole model's values of a weight (step 0) or a gradient, float64."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


def local_part(full: Tensor, parameter: Tensor, name: str, groups: ParallelGroups) -> Tensor:
    """What a tensor-parallel rank holds of a whole tensor; zeros in padded rows."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    if name == SHARED:
        full = nn.functional.pad(full, (0, 0, 0, PADDED_VOCAB_SIZE - VOCAB_SIZE))
    if name.endswith("gate.weight"):
        halves = [half.chunk(groups.tp_size)[groups.tp_rank] for half in full.chunk(2)]
        return torch.cat(halves)
    return full.chunk(groups.tp_size, dim=parameter.partition_dim)[groups.tp_rank]


def named_parameters(chunks: list[DistributedDataParallel]) -> Iterator[tuple[str, nn.Parameter]]:
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield name.removeprefix("module."), parameter


def set_gradients(chunks: list[DistributedDataParallel], step: int, groups: ParallelGroups, scale: float = 1.0) -> None:
    """As if forward, backward and the data-parallel reduction of `step` were done."""
    for name, parameter in named_parameters(chunks):
        parameter.main_grad.copy_(scale * local_part(full_tensor(name, step), parameter, name, groups))
