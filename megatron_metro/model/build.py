"""A configuration, a layout and this rank's place in it to the rank's initialised pieces of the chain."""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import nn

from megatron_metro.config.schema import RunConfig
from megatron_metro.config.terms import logit_means_original, target_kind
from megatron_metro.model.initialisation import initialise
from megatron_metro.model.piece import ChainPiece
from megatron_metro.model.piece_modules import PieceContext
from megatron_metro.model.specs import local_spec
from megatron_metro.model.transformer_config import build_transformer_configs
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.parallel.layout import StageLayout
from megatron_metro.parallel.vocab_ops import VocabShard


def pad_vocab_size(run: RunConfig) -> int:
    """Rows of the token matrix with padding: each tensor-parallel rank holds a multiple of the divisor."""
    assert run.model.vocab_size is not None, "resolved from the tokenizer before the model is built"
    multiple = run.model.make_vocab_size_divisible_by * run.parallel.tensor_model_parallel_size
    return -(-run.model.vocab_size // multiple) * multiple


def build_pieces(
    run: RunConfig, layout: StageLayout, groups: ParallelGroups, dtype: torch.dtype, pad_id: int
) -> list[ChainPiece]:
    """This rank's pieces in the order of their chunks, with initial weights that no layout changes."""
    assert run.model.vocab_size is not None
    context = PieceContext(
        model=run.model,
        configs=build_transformer_configs(run, dtype),
        spec=local_spec(
            recompute_scores=run.parallel.recompute_granularity == "selective",
            drops_activations=run.model.dropout_places == "t5",
        ),
        shard=VocabShard(
            vocab_size=run.model.vocab_size,
            padded_size=pad_vocab_size(run),
            rank=groups.tp_rank,
            size=groups.tp_size,
            group=groups.tp_group if groups.tp_size > 1 else None,
        ),
        collection=groups.collection,
        recompute=run.parallel.recompute_granularity == "full",
        pad_id=pad_id,
        target_kind=target_kind(run.objective),
        logit_means_original=logit_means_original(run.objective),
        eval_all_positions=run.objective.eval_all_positions,
    )
    pieces = [_build_piece(context, layout, groups.pp_rank, chunk) for chunk in range(layout.vpp_size)]
    for piece in pieces:
        mark_tensor_parallel(piece)
        initialise(piece, run.model, context.shard, run.training.seed)
    return pieces


def _build_piece(context: PieceContext, layout: StageLayout, pp_rank: int, chunk: int) -> ChainPiece:
    index = layout.piece_index(pp_rank, chunk)
    previous = layout.pieces[index - 1][-1] if index > 0 else None
    vp_stage = chunk if layout.vpp_size > 1 else None
    return ChainPiece(context, layout.pieces[index], previous, vp_stage)


def mark_tensor_parallel(module: nn.Module) -> None:
    """Say of each sharded weight along which dimension it is: core does so only when it initialises the weight itself.

    Norms, initialisation and checkpoints read these marks.
    """
    for child in module.modules():
        if isinstance(child, ColumnParallelLinear | VocabParallelEmbedding):
            set_tensor_model_parallel_attributes(child.weight, True, 0, 1)
        elif isinstance(child, RowParallelLinear):
            set_tensor_model_parallel_attributes(child.weight, True, 1, 1)
