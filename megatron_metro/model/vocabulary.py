"""The token matrix: one vocabulary-parallel weight that embeds ids and, tied, projects hidden states to logits."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import VocabParallelEmbedding, linear_with_grad_accumulation_and_async_allreduce
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_metro.parallel.vocab_ops import VocabShard


class TokenMatrix(VocabParallelEmbedding):
    """[v, h] rows of this rank's vocabulary.

    Both uses are calls of the module: megatron-core waits for an overlapped parameter gather in hooks on module calls,
    so a weight that is read without a call may still be an old one.
    """

    def __init__(self, config: TransformerConfig, shard: VocabShard, collection: ProcessGroupCollection) -> None:
        super().__init__(
            shard.padded_size,
            config.hidden_size,
            init_method=nn.init.zeros_,  # not called: `initialisation.py` fills all weights
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=collection.tp,
        )

    def forward(self, input_: Tensor, *, project: bool = False) -> Tensor:
        """Ids [b, s] to embeddings [s, b, h], or rows [r, h] to logits [r, v].

        Under sequence parallelism the embeddings are the rank's shard of the sequence. Projected rows are alike on all
        tensor-parallel ranks; backward sums their gradient over the group.
        """
        if not project:
            words: Tensor = super().forward(input_)
            return words if self.reduce_scatter_embeddings else words.transpose(0, 1)
        logits: Tensor = linear_with_grad_accumulation_and_async_allreduce(
            input=input_,
            weight=self.weight,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self.tp_group.size() > 1,
            sequence_parallel=False,
            tp_group=self.tp_group,
        )
        return logits
