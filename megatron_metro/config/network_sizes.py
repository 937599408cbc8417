"""Widths and heads of each network and inner widths of heads: the generator may be narrower or wider than the rest."""

from dataclasses import dataclass

from megatron_metro.config.chain import Network
from megatron_metro.config.schema import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSizes:
    """What the layers of one network are sized by."""

    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    head_size: int  # width of one head

    @property
    def heads_width(self) -> int:
        """Width of all heads together, which need not be the hidden size."""
        return self.num_attention_heads * self.head_size


def network_sizes(model: ModelConfig, network: Network) -> NetworkSizes:
    """The sizes of a network; the generator's are the main model's where no flag says otherwise.

    --kv-channels holds for all networks; without it each network's heads share its own width.
    """
    hidden, ffn, heads = model.hidden_size, model.ffn_hidden_size, model.num_attention_heads
    if network == "generator":
        hidden = model.generator_hidden_size or hidden
        ffn = model.generator_ffn_hidden_size or ffn
        heads = model.generator_num_attention_heads or heads
    return NetworkSizes(
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        head_size=model.kv_channels if model.kv_channels is not None else hidden // heads,
    )


def rtd_head_width(model: ModelConfig) -> int:
    """Inner width of the RTD head: what its last layer, to one logit, reads."""
    if model.rtd_head != "gelu":
        return model.hidden_size
    return model.rtd_head_hidden_size or model.ffn_hidden_size


def has_projected_embedding(model: ModelConfig) -> bool:
    """Whether the generator's width differs from that of the token matrix."""
    return model.has_generator and network_sizes(model, "generator").hidden_size != model.hidden_size
