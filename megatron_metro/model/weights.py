"""What the name of a weight says about its rows: which are the vocabulary's, and which lie side by side.

Initialisation, checkpoints and whoever gathers or cuts a weight must agree on both.
"""

from megatron_metro.config.schema import ModelConfig

VOCABULARY_ROWS = (
    "word_embeddings.weight",
    "lm_head.weight",
    "lm_transform.output_bias",
    "mlm_head.output.weight",
    "mlm_head.output_bias",
)


def has_vocabulary_rows(name: str) -> bool:
    """Whether a row is a token's, so that rows beyond the vocabulary are padding: zero, and in no checkpoint."""
    return name in VOCABULARY_ROWS


def count_parts(name: str, model: ModelConfig) -> int:
    """Matrices of equal size that a weight holds one above the other, of each of which a rank has its share.

    A gated feed-forward layer's first weight holds the gates and then the values; all others are one matrix.
    """
    return 2 if model.activation == "gated-gelu" and ".linear_fc1." in name else 1
