"""The named runs hold the numbers of their recipes and start on some number of processes."""

import pytest

from megatron_metro.config.presets import PRESETS
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.validation import resolve, validate

ARCHITECTURES = {  # encoder, decoder, generator, hidden, ffn, heads, vocabulary, buckets, distance, sharing
    "metro-tiny": (2, 2, 2, 64, 256, 4, None, 32, 128, "token"),
    "metro-base": (12, 12, 4, 768, 3072, 12, 33_280, 32, 128, "token"),
    "metro-base++": (12, 12, 4, 768, 3072, 12, 64_512, 32, 128, "token_pos_norm"),
    "metro-large++": (24, 24, 6, 1024, 4096, 16, 64_512, 128, 256, "token"),
    "metro-xl": (24, 24, 8, 2048, 8192, 32, 64_512, 128, 256, "token"),
}
RECIPES = {  # lr, warm-up, clip, BF16, steps, global batch, length
    "metro-tiny": (1e-3, 20, 0.0, False, 1000, 16, 128),
    "metro-base": (4e-4, 10_000, 0.0, False, 125_000, 2048, 512),
    "metro-base++": (2e-4, 10_000, 2.0, True, 2_000_000, 2048, 512),
    "metro-large++": (1e-4, 10_000, 2.0, True, 2_000_000, 2048, 512),
    "metro-xl": (1e-4, 10_000, 2.0, True, 2_000_000, 2048, 512),
}


def test_every_preset_has_its_numbers_here():
    assert set(PRESETS) == set(ARCHITECTURES) == set(RECIPES)


@pytest.mark.parametrize("name", PRESETS)
def test_architecture(name):
    m = PRESETS[name]().model
    assert ARCHITECTURES[name] == (
        m.encoder_num_layers,
        m.decoder_num_layers,
        m.generator_num_layers,
        m.hidden_size,
        m.ffn_hidden_size,
        m.num_attention_heads,
        m.vocab_size,
        m.relative_attention_num_buckets,
        m.relative_attention_max_distance,
        m.generator_embedding_sharing,
    )
    assert (m.rtd_head, m.norm_placement, m.activation, m.add_bias_linear) == ("roberta", "post", "relu", True)
    assert (m.hidden_dropout, m.attention_dropout, m.generator_dropout) == (0.1, 0.1, 0.0)


@pytest.mark.parametrize("name", PRESETS)
def test_recipe(name):
    run = PRESETS[name]()
    o, t = run.optimizer, run.training
    found = (o.lr, o.lr_warmup_iters, o.clip_grad, o.bf16, t.train_iters, t.global_batch_size)
    assert (*found, run.data.encoder_seq_length) == RECIPES[name]
    assert (o.weight_decay, o.adam_beta1, o.adam_beta2, o.adam_eps) == (0.01, 0.9, 0.98, 1e-6)
    assert (o.lr_decay_style, o.min_lr, o.fp16) == ("linear", 0.0, False)
    objective = run.objective
    assert (objective.mlm_loss_weight, objective.rtd_loss_weight, objective.lm_loss_weight) == (1.0, 50.0, 1.0)
    assert not objective.weighted_lm_loss


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_preset_is_valid_and_resolving_twice_changes_nothing(name, world_size):
    run = PRESETS[name]()
    assert isinstance(run, RunConfig)
    validate(run, world_size)
    resolved = resolve(run, world_size)
    assert resolve(resolved, world_size) == resolved
    assert resolved.optimizer.lr_decay_iters == run.training.train_iters
    assert resolved.data.decoder_seq_length == run.data.encoder_seq_length
