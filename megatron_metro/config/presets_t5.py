"""Named runs of T5's family: T5 v1.0 and v1.1, and SPACTOR, which trains T5 v1.0 with a generator.

Sizes are those of the published models, 32,128 rows of vocabulary included: 32,000 pieces, 100 sentinels and 28 rows
that no token uses. Batch and length are those of the released checkpoints; the optimizer is T5's Adafactor.
"""

from dataclasses import replace

from megatron_metro.config.schema import RunConfig

T5_VOCABULARY = 32_128


def t5_small() -> RunConfig:
    """T5 v1.0 small: 60,506,624 parameters."""
    return _resize(t5_base(), num_layers=6, hidden_size=512, ffn_hidden_size=2048, num_attention_heads=8)


def t5_base() -> RunConfig:
    """T5 v1.0 base: 222,903,552 parameters, 1,000,000 steps of 2,048 x 512 tokens."""
    run = RunConfig()  # the schema's depths, widths and heads are those of T5 base too
    return replace(
        run,
        model=replace(
            run.model,
            generator_num_layers=0,
            rtd_head="none",
            kv_channels=64,
            position_embedding_type="none",
            relative_attention="per_stack",
            relative_attention_decoder=True,
            relative_attention_bucket="t5",
            norm_placement="pre",
            normalization="RMSNorm",
            norm_epsilon=1e-6,
            add_bias_linear=False,
            softmax_scale=1.0,
            scale_lm_output=True,
            dropout_places="t5",
            vocab_size=T5_VOCABULARY,
        ),
        objective=replace(run.objective, objective="t5-span"),
        tokenizer=replace(run.tokenizer, vocab_extra_ids=100),
        # The rate 1 / sqrt(max(n, 10,000)) of T5, section 3.1.2, relative to the size of each parameter.
        optimizer=replace(
            run.optimizer,
            optimizer="adafactor",
            lr=0.01,
            lr_decay_style="inverse-square-root",
            lr_warmup_style="constant",
            lr_warmup_iters=10_000,
            weight_decay=0.0,
        ),
        training=replace(run.training, global_batch_size=2048, train_iters=1_000_000),
    )


def t5_large() -> RunConfig:
    """T5 v1.0 large: 737,668,096 parameters."""
    return _resize(t5_base(), num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16)


def t5_3b() -> RunConfig:
    """T5 v1.0 3B: as wide as large, with 32 heads of 128 and a feed-forward of 16,384; 2,851,598,336 parameters."""
    run = _resize(t5_base(), num_layers=24, hidden_size=1024, ffn_hidden_size=16_384, num_attention_heads=32)
    return replace(run, model=replace(run.model, kv_channels=128))


def t5_11b() -> RunConfig:
    """T5 v1.0 11B: 128 heads of 128 and a feed-forward of 65,536; 11,307,321,344 parameters."""
    run = _resize(t5_base(), num_layers=24, hidden_size=1024, ffn_hidden_size=65_536, num_attention_heads=128)
    return replace(run, model=replace(run.model, kv_channels=128))


def t5_v1_1_small() -> RunConfig:
    """T5 v1.1 small, 6 heads of 64 at width 512: 76,961,152 parameters."""
    return _resize(t5_v1_1_base(), num_layers=8, hidden_size=512, ffn_hidden_size=1024, num_attention_heads=6)


def t5_v1_1_base() -> RunConfig:
    """T5 v1.1 base: gated GELU, a head matrix of its own, no dropout in pretraining; 247,577,856 parameters."""
    run = t5_base()
    return replace(
        run,
        model=replace(
            run.model,
            ffn_hidden_size=2048,
            activation="gated-gelu",
            untie_embeddings_and_output_weights=True,
            scale_lm_output=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
    )


def t5_v1_1_large() -> RunConfig:
    """T5 v1.1 large: 783,150,080 parameters."""
    return _resize(t5_v1_1_base(), num_layers=24, hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=16)


def t5_v1_1_xl() -> RunConfig:
    """T5 v1.1 XL: 2,849,757,184 parameters."""
    return _resize(t5_v1_1_base(), num_layers=24, hidden_size=2048, ffn_hidden_size=5120, num_attention_heads=32)


def t5_v1_1_xxl() -> RunConfig:
    """T5 v1.1 XXL: 11,135,332,352 parameters."""
    return _resize(t5_v1_1_base(), num_layers=24, hidden_size=4096, ffn_hidden_size=10_240, num_attention_heads=64)


def spactor_base() -> RunConfig:
    """SPACTOR base: T5 v1.0 base, a generator of 4 layers with feed-forward 1024, heads of their own."""
    return _add_generator(t5_base(), num_layers=4, ffn_hidden_size=1024, rtd_width=3072)


def spactor_large() -> RunConfig:
    """SPACTOR large: T5 v1.0 large, a generator of 6 layers with feed-forward 2048, heads of their own."""
    run = _add_generator(t5_large(), num_layers=6, ffn_hidden_size=2048, rtd_width=4096)
    return replace(run, objective=replace(run.objective, spactor_mask_prob=0.2))


def _resize(
    run: RunConfig, *, num_layers: int, hidden_size: int, ffn_hidden_size: int, num_attention_heads: int
) -> RunConfig:
    return replace(
        run,
        model=replace(
            run.model,
            encoder_num_layers=num_layers,
            decoder_num_layers=num_layers,
            hidden_size=hidden_size,
            ffn_hidden_size=ffn_hidden_size,
            num_attention_heads=num_attention_heads,
        ),
    )


def _add_generator(run: RunConfig, *, num_layers: int, ffn_hidden_size: int, rtd_width: int) -> RunConfig:
    """SPACTOR's generator, heads and loss weights (equation 8) on a T5."""
    return replace(
        run,
        model=replace(
            run.model,
            generator_num_layers=num_layers,
            generator_ffn_hidden_size=ffn_hidden_size,
            mlm_head="linear",
            untie_mlm_head=True,
            rtd_head="gelu",
            rtd_head_hidden_size=rtd_width,
        ),
        objective=replace(run.objective, objective="spactor", rtd_loss_weight=10.0, lm_loss_weight=10.0),
    )
