"""Initial weights: the reference's distributions, and no layout that changes them."""

from dataclasses import replace

import pytest
import torch
from torch.nn import Parameter

from megatron_metro.config.schema import ModelConfig
from megatron_metro.model.initialisation import Distribution, choose_distribution, fill, initialise
from megatron_metro.parallel.vocab_ops import VocabShard

METRO = ModelConfig(vocab_size=33280)
T5 = ModelConfig(
    vocab_size=384, hidden_size=48, ffn_hidden_size=96, num_attention_heads=4, kv_channels=16, generator_num_layers=0,
    norm_placement="pre", normalization="RMSNorm", activation="gated-gelu", add_bias_linear=False,
    position_embedding_type="none", relative_attention="per_stack", relative_attention_bucket="t5",
)  # fmt: skip
NORMAL = Distribution(kind="normal", scale=1.0)
GOLDEN_NORMAL = [0.58399193005078, 0.89705299690473, -1.04240670532411]
GOLDEN_UNIFORM = [-0.84453403367661, -0.63172956299968, 0.37591667310335, -0.16202035010792, -0.64578593312763]


class FakeGroup:
    """Stands for a process group: a shard only looks whether it has one."""


def make_shard(model: ModelConfig, rank: int = 0, size: int = 1) -> VocabShard:
    padded = -(-model.vocab_size // (128 * size)) * 128 * size
    group = FakeGroup() if size > 1 else None
    return VocabShard(vocab_size=model.vocab_size, padded_size=padded, rank=rank, size=size, group=group)


def make_filled(
    name: str, shape: tuple[int, ...], model: ModelConfig = T5, *, dim: int | None = None, rank: int = 0, size: int = 1,
    distribution: Distribution | None = None, dtype: torch.dtype = torch.float64, seed: int = 3,
) -> torch.Tensor:  # fmt: skip
    """One rank's part of a parameter whose whole (padded) shape is given."""
    local = list(shape)
    if dim is not None:
        local[dim] //= size
    parameter = Parameter(torch.full(local, float("nan"), dtype=dtype))
    if dim is not None:
        parameter.tensor_model_parallel, parameter.partition_dim = True, dim
    with torch.no_grad():
        chosen = distribution or choose_distribution(name, model)
        fill(parameter, name, chosen, model=model, shard=make_shard(model, rank, size), seed=seed)
    return parameter.detach()


@pytest.mark.parametrize(
    ("name", "kind", "scale"),
    [
        ("word_embeddings.weight", "normal", 0.003876),
        ("encoder.position_embeddings.weight", "uniform", 0.0442),
        ("decoder.position_embeddings.weight", "uniform", 0.0442),
        ("encoder.layers.0.self_attention.linear_qkv.weight", "normal", 0.02552),
        ("encoder.layers.3.self_attention.linear_proj.weight", "normal", 0.02552),
        ("decoder.layers.11.cross_attention.linear_q.weight", "normal", 0.02552),
        ("decoder.layers.11.cross_attention.linear_kv.weight", "normal", 0.02552),
        ("decoder.layers.0.mlp.linear_fc1.weight", "normal", 0.01276),
        ("decoder.layers.0.mlp.linear_fc2.weight", "normal", 0.02552),
        ("decoder.layers.0.mlp.linear_fc2.bias", "constant", 0.0),
        ("encoder.layers.0.relative_bias.weight", "constant", 0.0),
        ("encoder.relative_bias.weight", "constant", 0.0),
        ("encoder.embedding_norm.weight", "constant", 1.0),
        ("encoder.layers.0.mlp_norm.bias", "constant", 0.0),
        ("generator.position_embeddings.weight", "normal", 0.02),
        ("generator.layers.0.mlp.linear_fc1.weight", "normal", 0.02),
        ("generator.layers.0.self_attention.linear_qkv.bias", "constant", 0.0),
        ("generator.layers.0.relative_bias.weight", "normal", 0.02),
        ("mlm_head.dense.weight", "uniform", 768**-0.5),
        ("mlm_head.dense.bias", "uniform", 768**-0.5),
        ("mlm_head.norm.weight", "constant", 1.0),
        ("mlm_head.output_bias", "constant", 0.0),
        ("rtd_head.dense.weight", "uniform", 768**-0.5),
        ("rtd_head.dense.bias", "uniform", 768**-0.5),
        ("rtd_head.output.weight", "constant", 0.0),
        ("rtd_head.output.bias", "constant", 0.0),
    ],
)
def test_metro_distributions_are_the_reference_values(name, kind, scale):
    distribution = choose_distribution(name, METRO)
    assert distribution.kind == kind
    assert distribution.scale == pytest.approx(scale, rel=2e-3)
    assert distribution.zero_line == (1 if "position_embeddings" in name else None)


def test_plain_normal_reaches_every_matrix():
    plain = replace(METRO, init_method="normal", init_method_std=0.03)
    for name in ("word_embeddings", "encoder.layers.0.relative_bias", "mlm_head.dense", "rtd_head.output"):
        assert choose_distribution(f"{name}.weight", plain) == Distribution(kind="normal", scale=0.03)
    for name in ("mlm_head.output_bias", "rtd_head.dense.bias", "decoder.layers.0.mlp.linear_fc1.bias"):
        assert choose_distribution(name, plain) == Distribution(kind="constant", scale=0.0)
    assert choose_distribution("decoder.embedding_norm.weight", plain).scale == 1.0
    assert choose_distribution("decoder.position_embeddings.weight", plain).zero_line == 1


def test_a_generator_is_drawn_by_its_own_sizes():
    """BERT's N(0, 0.02) in a METRO, T5's own in a Pre-LN model; heads go by what they read."""
    sizes = {"generator_hidden_size": 32, "generator_ffn_hidden_size": 80, "generator_num_attention_heads": 2}
    metro = replace(METRO, **sizes)
    for name in ("generator.embedding_projection", "mlm_head.projection", "mlm_head.output"):
        assert choose_distribution(f"{name}.weight", metro) == replace(NORMAL, scale=0.02)
    assert choose_distribution("mlm_head.dense.weight", metro).scale == 32**-0.5
    assert choose_distribution("rtd_head.dense.weight", metro).scale == 768**-0.5
    t5 = replace(T5, generator_num_layers=2, kv_channels=None, **sizes)
    scales = {
        "generator.embedding_projection": 48**-0.5,
        "generator.layers.0.mlp.linear_fc1": 32**-0.5,
        "generator.layers.0.mlp.linear_fc2": 80**-0.5,
        "generator.relative_bias": 32**-0.5,
        "mlm_head.projection": 32**-0.5,
        "mlm_head.output": 32**-0.5,
        "encoder.layers.0.mlp.linear_fc1": 48**-0.5,
        "lm_head": 48**-0.5,
    }
    for name, scale in scales.items():
        assert choose_distribution(f"{name}.weight", t5).scale == scale, name
    qkv = make_filled("generator.layers.0.self_attention.linear_qkv.weight", (96, 32), t5, dim=0)
    queries, keys, _ = qkv.view(2, 3, 16, 32).unbind(1)
    assert queries.std() == pytest.approx((32 * 16) ** -0.5, rel=0.06)
    assert keys.std() == pytest.approx(32**-0.5, rel=0.06)


def test_t5_distributions_are_hugging_face_s():
    qkv = make_filled("encoder.layers.0.self_attention.linear_qkv.weight", (192, 48), dim=0)
    queries, keys, values = qkv.view(4, 3, 16, 48).unbind(1)
    assert queries.std() == pytest.approx((48 * 16) ** -0.5, rel=0.05)
    assert keys.std() == pytest.approx(48**-0.5, rel=0.05) and values.std() == pytest.approx(48**-0.5, rel=0.05)
    assert choose_distribution("decoder.layers.0.cross_attention.linear_q.weight", T5).scale == (48 * 16) ** -0.5
    assert choose_distribution("decoder.layers.0.mlp.linear_fc2.weight", T5).scale == 96**-0.5
    assert choose_distribution("decoder.layers.0.self_attention.linear_proj.weight", T5).scale == 64**-0.5
    assert choose_distribution("encoder.relative_bias.weight", T5).scale == 48**-0.5
    assert choose_distribution("word_embeddings.weight", T5).scale == 1.0
    assert choose_distribution("encoder.final_norm.weight", T5).scale == 1.0


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("name", "shape", "dim"),
    [
        ("encoder.layers.0.self_attention.linear_qkv.weight", (192, 48), 0),
        ("encoder.layers.0.self_attention.linear_proj.weight", (48, 64), 1),
        ("encoder.layers.0.mlp.linear_fc2.weight", (480, 960), 1),  # several blocks
        ("decoder.layers.0.cross_attention.linear_kv.weight", (1280, 480), 0),
        ("decoder.relative_bias.weight", (32, 4), 1),
    ],
)
def test_ranks_hold_slices_of_the_whole(name, shape, dim, size):
    whole = make_filled(name, shape, dim=dim)
    parts = [make_filled(name, shape, dim=dim, rank=rank, size=size) for rank in range(size)]
    assert torch.equal(torch.cat(parts, dim=dim), whole)
    assert torch.equal(make_filled(name, shape), whole)  # marks or none


@pytest.mark.parametrize("size", [2, 4])
def test_a_gated_layer_gives_each_rank_its_share_of_both_matrices(size):
    name = "encoder.layers.0.mlp.linear_fc1.weight"
    gate, value = make_filled(name, (192, 48), dim=0).chunk(2)
    for rank in range(size):
        expected = torch.cat([gate.chunk(size)[rank], value.chunk(size)[rank]])
        assert torch.equal(make_filled(name, (192, 48), dim=0, rank=rank, size=size), expected)


@pytest.mark.parametrize("name", ["word_embeddings.weight", "lm_head.weight", "mlm_head.output.weight"])
def test_padded_vocabulary_is_zero_and_changes_nothing(name):
    model = replace(T5, vocab_size=300)
    whole = make_filled(name, (384, 48), model, dim=0)
    assert not whole[300:].any() and whole[:300].all()
    parts = [make_filled(name, (512, 48), model, dim=0, rank=rank, size=4) for rank in range(4)]
    joined = torch.cat(parts)  # the third rank holds 44 real rows, the fourth none
    assert torch.equal(joined[:300], whole[:300])
    assert not joined[300:].any()


def test_values_depend_on_seed_name_and_unpadded_shape_only():
    base = make_filled("a.linear_fc1.weight", (64, 48), distribution=NORMAL)
    assert torch.equal(base, make_filled("a.linear_fc1.weight", (64, 48), distribution=NORMAL))
    low = make_filled("a.linear_fc1.weight", (64, 48), distribution=NORMAL, dtype=torch.bfloat16)
    assert torch.equal(low, base.bfloat16())
    others = [
        make_filled("a.linear_fc1.weight", (64, 48), distribution=NORMAL, seed=4),
        make_filled("b.linear_fc1.weight", (64, 48), distribution=NORMAL),
        make_filled("a.linear_fc1.weight", (65, 48), distribution=NORMAL)[:64],
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]) < 0.06


def test_moments_and_independence():
    normal = make_filled("a.linear_fc1.weight", (1000, 400), distribution=NORMAL)
    assert abs(normal.mean()) < 0.006 and normal.std() == pytest.approx(1.0, abs=0.005)
    assert (normal**3).mean() == pytest.approx(0.0, abs=0.02) and (normal**4).mean() == pytest.approx(3.0, abs=0.06)
    rows = torch.corrcoef(normal[:200])  # spans a border between blocks at row 163
    assert (rows - torch.eye(200)).abs().max() < 0.3
    uniform = make_filled("a.dense.weight", (500, 400), distribution=Distribution(kind="uniform", scale=2.0))
    assert uniform.abs().max() <= 2.0 and uniform.std() == pytest.approx(2 / 3**0.5, rel=0.01)


def test_initialise_fills_every_parameter_of_a_module():
    module = torch.nn.Module()
    module.word_embeddings, module.mlm_head = torch.nn.Embedding(384, 48), torch.nn.Module()
    module.mlm_head.dense, module.mlm_head.norm = torch.nn.Linear(48, 48), torch.nn.LayerNorm(48)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    initialise(module, replace(T5, norm_placement="post"), make_shard(T5), seed=3)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert torch.equal(module.mlm_head.norm.weight, torch.ones(48))
    assert torch.equal(module.mlm_head.dense.weight, make_filled("mlm_head.dense.weight", (48, 48)).float())


def test_padding_position_row_is_zero():
    table = make_filled("encoder.position_embeddings.weight", (1026, 48), replace(T5, norm_placement="post"))
    assert not table[1].any() and table[0].all() and table[2:].all()


def test_golden_values():
    """A change here changes every run that starts from a seed."""
    normal = make_filled("encoder.layers.0.mlp.linear_fc2.weight", (4, 3), distribution=NORMAL)
    uniform = make_filled("mlm_head.dense.bias", (5,), distribution=Distribution(kind="uniform", scale=1.0))
    assert normal[0].tolist() == pytest.approx(GOLDEN_NORMAL, abs=1e-12)
    assert uniform.tolist() == pytest.approx(GOLDEN_UNIFORM, abs=1e-12)
