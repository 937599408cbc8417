"""Initial weights: a function of (seed, parameter name, unpadded shape) that no layout changes (design section 5).

Values come from Philox words under a key made of those three, mapped to numbers here, because library generators change
their streams between versions. They are made in fixed blocks of lines; a line is a slice along the dimension that
tensor parallelism shards, so a rank makes its own lines (and at most two blocks' edges) and nothing else.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from megatron_metro.config.chain import Network
from megatron_metro.config.network_sizes import NetworkSizes, network_sizes
from megatron_metro.config.schema import ModelConfig
from megatron_metro.model.network import PADDING_POSITION_ROW
from megatron_metro.model.weights import count_parts, has_vocabulary_rows
from megatron_metro.parallel.vocab_ops import VocabShard

_BLOCK_ELEMENTS = 2**16
_SHARDED_ALONG_DIM_1 = ("linear_proj.weight", "linear_fc2.weight", "relative_bias.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """What a parameter's values are drawn from: N(0, scale), uniform in [-scale, scale), or everywhere `scale`."""

    kind: Literal["normal", "uniform", "constant"]
    scale: float
    zero_line: int | None = None  # a row that starts as zero
    query_factor: float = 1.0  # of the query rows of a fused projection


@torch.no_grad()
def initialise(module: nn.Module, model: ModelConfig, shard: VocabShard, seed: int) -> None:
    """Fill every parameter of a piece of the chain; copies of a shared weight come out equal wherever they are."""
    for name, parameter in module.named_parameters():
        fill(parameter, name, choose_distribution(name, model), model=model, shard=shard, seed=seed)


def fill(
    parameter: Tensor, name: str, distribution: Distribution, *, model: ModelConfig, shard: VocabShard, seed: int
) -> None:
    """Fill one parameter, or the rank's shard of it, in place. Rows of vocabulary padding become zero.

    A sharded parameter carries megatron-core's marks `tensor_model_parallel` and `partition_dim`.
    """
    if distribution.kind == "constant":
        parameter.fill_(distribution.scale)
        return
    dim = 1 if name.endswith(_SHARDED_ALONG_DIM_1) else 0
    size, rank = 1, 0
    if getattr(parameter, "tensor_model_parallel", False):
        assert parameter.partition_dim == dim, f"{name} is sharded along an unexpected dimension"  # type: ignore[attr-defined]
        size, rank = shard.size, shard.rank
    lines = parameter.movedim(dim, 0)
    num_local = lines.shape[0]
    num_lines = shard.vocab_size if has_vocabulary_rows(name) else num_local * size
    num_parts = count_parts(name, model)
    part_size = num_local // num_parts
    stream = _Stream(name=name, seed=seed, num_lines=num_lines, line_shape=tuple(lines.shape[1:]))
    for part in range(num_parts):
        start = part * part_size * size + rank * part_size
        _fill_lines(lines[part * part_size : (part + 1) * part_size], start, stream, distribution)
    if distribution.zero_line is not None:
        lines[distribution.zero_line].zero_()
    if distribution.query_factor != 1.0:
        head_size = _find_sizes(name, model).head_size
        lines.view(-1, 3, head_size, *lines.shape[1:])[:, 0].mul_(distribution.query_factor)


def choose_distribution(name: str, model: ModelConfig) -> Distribution:
    """The initial distribution of a parameter under its canonical name.

    `--init-method metro` means the reference's (section 1.8) for a Post-LN model and, for a Pre-LN one, T5's own.
    """
    network, (module, leaf), sizes = name.split(".")[0], name.split(".")[-2:], _find_sizes(name, model)
    if module.endswith("norm"):
        return _constant(1.0 if leaf == "weight" else 0.0)
    if model.init_method == "normal":
        distribution = _normal(model.init_method_std) if leaf == "weight" else _constant(0.0)
    elif module == "dense" and network in ("mlm_head", "rtd_head", "lm_transform"):
        distribution = Distribution(kind="uniform", scale=sizes.hidden_size**-0.5)
    elif leaf != "weight" or network == "rtd_head":
        distribution = _constant(0.0)
    elif model.norm_placement == "pre":
        distribution = _choose_for_t5(module, model, sizes)
    elif network in ("generator", "mlm_head"):
        distribution = _normal(model.init_method_std)
    else:
        distribution = _choose_for_metro(module, model)
    if module == "position_embeddings":
        distribution = replace(distribution, zero_line=PADDING_POSITION_ROW)
    return distribution


def _choose_for_metro(module: str, model: ModelConfig) -> Distribution:
    """Weights of encoder, decoder and vocabulary: the standard deviation depends on the output size alone."""
    assert model.vocab_size is not None
    attention_size = model.num_attention_heads * model.head_size
    output_sizes = {
        "word_embeddings": model.vocab_size,  # as the output projection it is tied to
        "lm_head": model.vocab_size,
        "position_embeddings": model.hidden_size,
        "linear_qkv": attention_size,
        "linear_q": attention_size,
        "linear_kv": attention_size,
        "linear_proj": model.hidden_size,
        "linear_fc1": model.ffn_hidden_size,
        "linear_fc2": model.hidden_size,
    }
    if module == "relative_bias":
        return _constant(0.0)
    std = (2 * output_sizes[module]) ** -0.5
    if module == "position_embeddings":
        return Distribution(kind="uniform", scale=math.sqrt(3) * std)
    return _normal(std)


def _choose_for_t5(module: str, model: ModelConfig, sizes: NetworkSizes) -> Distribution:
    """Weights of a T5: the standard deviation depends on the input size, and queries carry the attention scale."""
    stds = {
        "word_embeddings": 1.0,
        # Matrices of their own start with logits of size 1, as in T5's code; transformers draws lm_head from N(0, 1).
        "lm_head": model.hidden_size**-0.5,
        "output": sizes.hidden_size**-0.5,
        "projection": sizes.hidden_size**-0.5,
        "embedding_projection": model.hidden_size**-0.5,
        "position_embeddings": model.hidden_size**-0.5,
        "relative_bias": sizes.hidden_size**-0.5,
        "linear_qkv": sizes.hidden_size**-0.5,
        "linear_q": (sizes.hidden_size * sizes.head_size) ** -0.5,
        "linear_kv": sizes.hidden_size**-0.5,
        "linear_proj": sizes.heads_width**-0.5,
        "linear_fc1": sizes.hidden_size**-0.5,
        "linear_fc2": sizes.ffn_hidden_size**-0.5,
    }
    return replace(_normal(stds[module]), query_factor=sizes.head_size**-0.5 if module == "linear_qkv" else 1.0)


def _find_sizes(name: str, model: ModelConfig) -> NetworkSizes:
    """The sizes of the network that a weight belongs to, or whose output its head reads."""
    networks: dict[str, Network] = {"generator": "generator", "mlm_head": "generator"}
    return network_sizes(model, networks.get(name.split(".")[0], "encoder"))


def _normal(std: float) -> Distribution:
    return Distribution(kind="normal", scale=std)


def _constant(value: float) -> Distribution:
    return Distribution(kind="constant", scale=value)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stream:
    """The numbers of one whole parameter, cut into lines."""

    name: str
    seed: int
    num_lines: int
    line_shape: tuple[int, ...]

    @property
    def lines_per_block(self) -> int:
        return min(self.num_lines, max(1, _BLOCK_ELEMENTS // math.prod(self.line_shape)))

    def draw_block(self, block: int, kind: Literal["normal", "uniform"]) -> Tensor:
        """float64 [lines_per_block, *line_shape]: N(0, 1), or uniform in [-1, 1)."""
        identity = f"{self.seed}/{self.name}/{self.num_lines}/{self.line_shape}"
        key = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:16], "little")
        shape = (self.lines_per_block, *self.line_shape)
        num_words = -(-math.prod(shape) // 2)  # one 64-bit word is two numbers
        words = np.random.Philox(key=key, counter=block << 64).random_raw(num_words)
        halves = torch.from_numpy(words.astype("<u8").view("<u4").astype(np.float64))
        uniforms = (halves + 0.5).mul_(2.0**-32)  # in (0, 1), never its ends
        if kind == "uniform":
            values = uniforms.mul_(2.0).sub_(1.0)
        else:
            values = _box_muller(uniforms.view(2, -1)).flatten()
        return values[: math.prod(shape)].view(shape)


def _box_muller(uniforms: Tensor) -> Tensor:
    """[2, n] uniforms to [2, n] independent standard normals."""
    radius, angle = uniforms[0].log().mul_(-2.0).sqrt_(), uniforms[1] * (2.0 * math.pi)
    return torch.stack([angle.cos().mul_(radius), angle.sin().mul_(radius)])


def _fill_lines(local_lines: Tensor, start: int, stream: _Stream, distribution: Distribution) -> None:
    """Local lines are the stream's from `start` on; those beyond its end are padding and become zero."""
    assert distribution.kind != "constant"
    end = max(start, min(start + local_lines.shape[0], stream.num_lines))
    local_lines[end - start :].zero_()
    per_block = stream.lines_per_block
    for block in range(start // per_block, -(-end // per_block)):
        first, last = max(start, block * per_block), min(end, (block + 1) * per_block)
        if first >= last:
            continue
        values = stream.draw_block(block, distribution.kind)[first - block * per_block : last - block * per_block]
        local_lines[first - start : last - start].copy_(values * distribution.scale)
