"""What the CPU adapter costs: the same forward and backward pass of core's layers with its rows in and out.

Run as `python -m tests.helpers.adapter_cost`. Not a test: the machine's other load decides how good the number is, so
both ways alternate, and the CPU time of this thread is taken.
"""

import statistics
import time

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_metro.device import CPU_ADAPTER, activate
from megatron_metro.parallel.groups import single_process

SEQUENCE, BATCH, NUM_LAYERS = 128, 4, 4


class Layer(nn.Module):
    """Norm, projection of queries, keys and values, attention, projection, norm, feed-forward: core's linears."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        options = {"config": config, "init_method": nn.init.xavier_normal_, "skip_bias_add": False, "bias": True}
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = ColumnParallelLinear(width, 3 * width, gather_output=False, **options)
        self.up = ColumnParallelLinear(width, 4 * width, gather_output=False, **options)
        self.out = RowParallelLinear(width, width, input_is_parallel=True, **options)
        self.down = RowParallelLinear(4 * width, width, input_is_parallel=True, **options)

    def forward(self, hidden: Tensor) -> Tensor:
        s, b, h = hidden.shape
        query, key, value = self.qkv(self.norm_1(hidden))[0].view(s, b, 4, 3 * h // 4).permute(1, 2, 0, 3).chunk(3, -1)
        scores = (query @ key.transpose(-1, -2) * (h // 4) ** -0.5).softmax(-1)
        attended = (scores @ value).permute(2, 0, 1, 3).reshape(s, b, h)
        hidden = hidden + self.out(attended)[0]
        return hidden + self.down(self.up(self.norm_2(hidden))[0].relu())[0]


def run_once(layers: nn.Sequential, hidden: Tensor) -> float:
    """Seconds of this thread's CPU time for one forward and backward pass."""
    start = time.thread_time()
    layers(hidden).sum().backward()
    return time.thread_time() - start


def measure_adapter_overhead(hidden_size: int, num_repeats: int = 100) -> float:
    """Percent by which the adapter lengthens a forward and backward pass of four layers of this width."""
    device = activate("cpu")
    single_process(device)
    device.seed_all(1234)
    config = TransformerConfig(num_layers=NUM_LAYERS, hidden_size=hidden_size, num_attention_heads=4)
    layers = nn.Sequential(*(Layer(config) for _ in range(NUM_LAYERS)))
    hidden = torch.randn(SEQUENCE, BATCH, hidden_size)
    with_adapter, without = [], []
    try:
        for _ in range(num_repeats):
            with_adapter.append(run_once(layers, hidden))
            for patch in CPU_ADAPTER:
                patch.remove()
            without.append(run_once(layers, hidden))
            for patch in CPU_ADAPTER:
                patch.install()
    finally:
        for patch in CPU_ADAPTER:
            patch.install()
    return 100 * (statistics.median(with_adapter) / statistics.median(without) - 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for width in (64, 256):
        print(f"h={width}: {measure_adapter_overhead(width):+.2f} %")
