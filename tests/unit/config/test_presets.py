"""The named runs hold the numbers of their recipes and start on some number of processes."""

import pytest

from megatron_metro.config.presets import PRESETS
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.validation import resolve, validate

ARCHITECTURES = {  # encoder, decoder, generator, hidden, ffn, heads, vocabulary
    "metro-tiny": (2, 2, 2, 64, 256, 4, None),
    "metro-base": (12, 12, 4, 768, 3072, 12, 33_280),
    "metro-base++": (12, 12, 4, 768, 3072, 12, 64_512),
    "metro-large++": (24, 24, 6, 1024, 4096, 16, 64_512),
    "metro-xl": (24, 24, 8, 2048, 8192, 32, 64_512),
    "t5-metro-base": (12, 12, 0, 768, 3072, 12, 33_280),
    "t5-metro-base++": (12, 12, 0, 768, 3072, 12, 64_512),
    "t5-small": (6, 6, 0, 512, 2048, 8, 32_128),
    "t5-base": (12, 12, 0, 768, 3072, 12, 32_128),
    "t5-large": (24, 24, 0, 1024, 4096, 16, 32_128),
    "t5-3b": (24, 24, 0, 1024, 16_384, 32, 32_128),
    "t5-11b": (24, 24, 0, 1024, 65_536, 128, 32_128),
    "t5-v1.1-small": (8, 8, 0, 512, 1024, 6, 32_128),
    "t5-v1.1-base": (12, 12, 0, 768, 2048, 12, 32_128),
    "t5-v1.1-large": (24, 24, 0, 1024, 2816, 16, 32_128),
    "t5-v1.1-xl": (24, 24, 0, 2048, 5120, 32, 32_128),
    "t5-v1.1-xxl": (24, 24, 0, 4096, 10_240, 64, 32_128),
    "spactor-base": (12, 12, 4, 768, 3072, 12, 32_128),
    "spactor-large": (24, 24, 6, 1024, 4096, 16, 32_128),
}
RECIPES = {  # lr, warm-up, clip, BF16, steps, global batch, length
    "metro-tiny": (1e-3, 20, 0.0, False, 1000, 16, 128),
    "metro-base": (4e-4, 10_000, 0.0, False, 125_000, 2048, 512),
    "metro-base++": (2e-4, 10_000, 2.0, True, 2_000_000, 2048, 512),
    "metro-large++": (1e-4, 10_000, 2.0, True, 2_000_000, 2048, 512),
    "metro-xl": (1e-4, 10_000, 2.0, True, 2_000_000, 2048, 512),
    "t5-metro-base": (4e-4, 10_000, 0.0, False, 125_000, 2048, 512),
    "t5-metro-base++": (2e-4, 10_000, 0.0, False, 2_000_000, 2048, 512),
}
BUCKETS = {"metro-large++": (128, 256), "metro-xl": (128, 256)}
METRO = [name for name in RECIPES if name.startswith("metro-")]
CONTROLS = [name for name in RECIPES if name.startswith("t5-metro-")]
T5 = [name for name in ARCHITECTURES if name not in RECIPES]


def test_every_preset_has_its_numbers_here():
    assert set(PRESETS) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", PRESETS)
def test_sizes(name):
    m = PRESETS[name]().model
    assert ARCHITECTURES[name] == (
        m.encoder_num_layers,
        m.decoder_num_layers,
        m.generator_num_layers,
        m.hidden_size,
        m.ffn_hidden_size,
        m.num_attention_heads,
        m.vocab_size,
    )
    buckets = m.relative_attention_num_buckets, m.relative_attention_max_distance
    assert buckets == BUCKETS.get(name, (32, 128))


@pytest.mark.parametrize("name", [*METRO, *CONTROLS])
def test_metro_s_architecture(name):
    m = PRESETS[name]().model
    assert (m.rtd_head, m.norm_placement, m.activation, m.add_bias_linear) == (
        "none" if name in CONTROLS else "roberta",
        "post",
        "relu",
        True,
    )
    assert m.generator_embedding_sharing == ("token_pos_norm" if name == "metro-base++" else "token")
    assert (m.hidden_dropout, m.attention_dropout, m.generator_dropout) == (0.1, 0.1, 0.0)
    assert m.dropout_places == "metro"


@pytest.mark.parametrize("name", T5)
def test_t5_s_architecture(name):
    m = PRESETS[name]().model
    assert (m.norm_placement, m.normalization, m.norm_epsilon, m.add_bias_linear) == ("pre", "RMSNorm", 1e-6, False)
    assert (m.position_embedding_type, m.relative_attention, m.relative_attention_decoder) == (
        "none",
        "per_stack",
        True,
    )
    assert (m.relative_attention_bucket, m.softmax_scale) == ("t5", 1.0)
    assert m.kv_channels == (128 if name in ("t5-3b", "t5-11b") else 64)
    is_new = name.startswith("t5-v1.1")
    assert (m.activation, m.untie_embeddings_and_output_weights, m.scale_lm_output) == (
        ("gated-gelu", True, False) if is_new else ("relu", False, True)
    )
    assert m.hidden_dropout == m.attention_dropout == (0.0 if is_new else 0.1)
    assert m.dropout_places == "t5"


@pytest.mark.parametrize(("name", "ffn", "rtd"), [("spactor-base", 1024, 3072), ("spactor-large", 2048, 4096)])
def test_spactor_s_generator_and_heads(name, ffn, rtd):
    m = PRESETS[name]().model
    assert (m.generator_hidden_size, m.generator_ffn_hidden_size, m.generator_num_attention_heads) == (None, ffn, None)
    assert (m.mlm_head, m.untie_mlm_head, m.rtd_head, m.rtd_head_hidden_size) == ("linear", True, "gelu", rtd)


@pytest.mark.parametrize("name", RECIPES)
def test_metro_s_recipes(name):
    run = PRESETS[name]()
    o, t = run.optimizer, run.training
    found = (o.lr, o.lr_warmup_iters, o.clip_grad, o.bf16, t.train_iters, t.global_batch_size)
    assert (*found, run.data.encoder_seq_length) == RECIPES[name]
    assert (o.weight_decay, o.adam_beta1, o.adam_beta2, o.adam_eps) == (0.01, 0.9, 0.98, 1e-6)
    assert (o.lr_decay_style, o.min_lr, o.fp16) == ("linear", 0.0, False)
    objective = run.objective
    assert objective.objective == ("t5-metro" if name in CONTROLS else "metro")
    assert (objective.mlm_loss_weight, objective.rtd_loss_weight, objective.lm_loss_weight) == (1.0, 50.0, 1.0)
    assert not objective.weighted_lm_loss


@pytest.mark.parametrize("name", T5)
def test_t5_s_recipe(name):
    run = PRESETS[name]()
    o, t = run.optimizer, run.training
    assert (o.lr_decay_style, o.lr_warmup_iters, o.weight_decay) == ("inverse-square-root", 10_000, 0.0)
    assert (t.train_iters, t.global_batch_size, run.data.encoder_seq_length) == (1_000_000, 2048, 512)
    assert run.tokenizer.vocab_extra_ids == 100
    assert (o.optimizer, o.lr, o.lr_warmup_style) == ("adafactor", 0.01, "constant")
    assert run.objective.objective == ("spactor" if name.startswith("spactor") else "t5-span")
    assert resolve(run, 1).data.decoder_seq_length == 114
    if name.startswith("spactor"):
        weights = (run.objective.mlm_loss_weight, run.objective.rtd_loss_weight, run.objective.lm_loss_weight)
        assert weights == (1.0, 10.0, 10.0)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_preset_is_valid_and_resolving_twice_changes_nothing(name, world_size):
    run = PRESETS[name]()
    assert isinstance(run, RunConfig)
    validate(run, world_size)
    resolved = resolve(run, world_size)
    assert resolve(resolved, world_size) == resolved
    assert resolved.optimizer.lr_decay_iters == run.training.train_iters
    if run.objective.objective == "metro":
        assert resolved.data.decoder_seq_length == run.data.encoder_seq_length
