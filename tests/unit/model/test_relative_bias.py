"""Buckets against the reference's tables and Hugging Face's T5; the bias against plain indexing."""

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from megatron_metro.config.schema import ModelConfig, RunConfig
from megatron_metro.model.buckets import metro_buckets, t5_buckets
from megatron_metro.model.relative_bias import RelativeBias, expand_diagonals
from megatron_metro.model.transformer_config import build_transformer_configs

# Reference section 1.4: the first distance of each bucket.
BASE_STARTS = {8: 8, 9: 9, 10: 12, 11: 18, 12: 27, 13: 39, 14: 58, 15: 86}
LARGE_FIRST = [33, 35, 37, 40, 42, 45, 48, 52, 55, 59, 63, 67, 72, 77, 82, 88, 94, 100, 107, 115, 123, 131, 140, 150]
LARGE_STARTS = dict(zip(range(33, 64), [*LARGE_FIRST, 160, 171, 183, 196, 209, 224, 239]))


@pytest.mark.parametrize(
    ("num_buckets", "max_distance", "starts"), [(32, 128, BASE_STARTS), (128, 256, LARGE_STARTS)], ids=["base", "large"]
)
def test_metro_buckets_follow_the_reference_tables(num_buckets, max_distance, starts):
    zero = num_buckets // 2 - 1
    distances = torch.arange(0, 1024)
    buckets = metro_buckets(distances, num_buckets, max_distance) - zero
    num_exact = num_buckets // 4
    assert buckets[: num_exact + 1].tolist() == list(range(num_exact + 1))
    for bucket, first in starts.items():
        assert int((buckets >= bucket).nonzero()[0]) == first
    assert buckets.max() == zero
    backwards = metro_buckets(-distances, num_buckets, max_distance) - zero
    assert torch.equal(backwards, -buckets)


def test_published_and_trained_large_tables_differ_where_the_reference_says():
    distances = torch.arange(0, 1024)
    differ = (metro_buckets(distances, 128, 256) != metro_buckets(distances, 128, 128)).nonzero().flatten()
    assert (len(differ), int(differ.min()), int(differ.max())) == (205, 34, 238)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (128, 256), (16, 20), (64, 1000)])
def test_t5_buckets_equal_hugging_face(num_buckets, max_distance, is_causal):
    distances = torch.arange(-5000, 5001)
    expected = T5Attention._relative_position_bucket(
        distances, bidirectional=not is_causal, num_buckets=num_buckets, max_distance=max_distance
    )
    assert torch.equal(t5_buckets(distances, num_buckets, max_distance, is_causal=is_causal), expected)


@pytest.mark.parametrize(("query_length", "key_length"), [(1, 1), (5, 5), (1, 7), (6, 1), (4, 9), (9, 4)])
def test_expanded_diagonals_equal_plain_indexing(query_length, key_length):
    values = torch.randn(3, query_length + key_length - 1, dtype=torch.float64, requires_grad=True)
    index = torch.arange(key_length) - torch.arange(query_length)[:, None] + query_length - 1
    weights = torch.randn(3, query_length, key_length, dtype=torch.float64)
    bias = expand_diagonals(values, query_length, key_length)
    assert torch.equal(bias, values[:, index])
    (mine,) = torch.autograd.grad((bias * weights).sum(), values)
    (expected,) = torch.autograd.grad((values[:, index] * weights).sum(), values)
    assert torch.allclose(mine, expected, rtol=0, atol=1e-14)


def make_bias(groups, is_decoder=False, **options) -> RelativeBias:
    model = ModelConfig(hidden_size=16, ffn_hidden_size=32, num_attention_heads=4, vocab_size=256, **options)
    config = build_transformer_configs(RunConfig(model=model), torch.float64)["decoder" if is_decoder else "encoder"]
    module = RelativeBias(config, model, is_decoder=is_decoder, tp_group=groups.tp_group)
    with torch.no_grad():
        module.weight.normal_()
    return module


@pytest.mark.parametrize(("kind", "is_decoder"), [("metro", False), ("t5", False), ("t5", True)])
def test_module_reads_its_table_by_bucket(groups, kind, is_decoder):
    module = make_bias(groups, is_decoder, relative_attention_bucket=kind)
    s = 300  # beyond the last bucket
    distances = torch.arange(s) - torch.arange(s)[:, None]
    if kind == "metro":
        buckets = metro_buckets(distances, 32, 128)
    else:
        buckets = t5_buckets(distances, 32, 128, is_causal=is_decoder)
    expected = module.weight[buckets].permute(2, 0, 1)[None]
    bias = module(s, s)
    assert bias.shape == (1, 4, s, s)
    assert torch.equal(bias, expected)
    weights = torch.randn_like(bias)
    (mine,) = torch.autograd.grad((bias * weights).sum(), module.weight)
    (plain,) = torch.autograd.grad((expected * weights).sum(), module.weight)
    assert torch.allclose(mine, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "is_decoder"), [("metro", False), ("metro", True), ("t5", True)])
def test_later_queries_read_the_rows_they_have_in_the_whole(groups, kind, is_decoder):
    module = make_bias(groups, is_decoder, relative_attention_bucket=kind)
    whole = module(200, 200)
    assert torch.equal(module(1, 200, 199), whole[:, :, 199:])
    assert torch.equal(module(3, 50, 17), whole[:, :, 17:20, :50])


def test_gradients_of_several_microbatches_add_up(groups):
    module = make_bias(groups)
    for length in (7, 7, 12):  # every call builds a graph of its own
        module(length, length).sum().backward()
    assert float(module.weight.grad.sum()) == pytest.approx(4 * (49 + 49 + 144))


def test_table_is_sharded_by_head(groups):
    module = make_bias(groups)
    assert module.weight.tensor_model_parallel and module.weight.partition_dim == 1
