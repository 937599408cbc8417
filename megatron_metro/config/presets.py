"""Named runs: functions, each changing a few fields of another. METRO's are here (reference sections 1.1 and 5)."""

from collections.abc import Callable
from dataclasses import replace

from megatron_metro.config import presets_t5
from megatron_metro.config.schema import RunConfig


def metro_base() -> RunConfig:
    """METRO base: 12+12 layers, 32k vocabulary, 125,000 steps. The recipe ran in FP16; add --bf16 on a GPU."""
    run = RunConfig()  # the schema's defaults are METRO base's architecture and optimizer
    return replace(
        run,
        model=replace(run.model, vocab_size=33_280),
        training=replace(run.training, micro_batch_size=16, global_batch_size=2048, train_iters=125_000),
    )


def metro_tiny() -> RunConfig:
    """A METRO that trains in seconds on a CPU, for first tries and tests; the vocabulary is the tokenizer's."""
    run = metro_base()
    return replace(
        run,
        model=replace(
            run.model,
            encoder_num_layers=2,
            decoder_num_layers=2,
            generator_num_layers=2,
            hidden_size=64,
            ffn_hidden_size=256,
            num_attention_heads=4,
            # The reference's 0.02 is for width 768: at 64 the generator's attention stays flat for hundreds of steps.
            init_method_std=0.1,
            vocab_size=None,
        ),
        data=replace(run.data, encoder_seq_length=128),
        tokenizer=replace(run.tokenizer, vocab_extra_ids=128),
        optimizer=replace(run.optimizer, lr=1e-3, lr_warmup_iters=20),
        training=replace(run.training, micro_batch_size=4, global_batch_size=16, train_iters=1000, eval_interval=100),
    )


def metro_base_plus_plus() -> RunConfig:
    """METRO base++: 64k vocabulary, positions and embedding norm shared too, 2,000,000 steps, BF16, clip 2."""
    run = metro_base()
    return replace(
        run,
        model=replace(run.model, vocab_size=64_512, generator_embedding_sharing="token_pos_norm"),
        optimizer=replace(run.optimizer, lr=2e-4, clip_grad=2.0, bf16=True),
        training=replace(run.training, train_iters=2_000_000),
    )


def metro_large_plus_plus() -> RunConfig:
    """METRO large++: 24+24 layers of width 1024, generator 6, finer relative bias, token matrix shared only."""
    run = metro_base_plus_plus()
    return replace(
        run,
        model=replace(
            run.model,
            encoder_num_layers=24,
            decoder_num_layers=24,
            generator_num_layers=6,
            hidden_size=1024,
            ffn_hidden_size=4096,
            num_attention_heads=16,
            relative_attention_num_buckets=128,
            relative_attention_max_distance=256,
            generator_embedding_sharing="token",
        ),
        optimizer=replace(run.optimizer, lr=1e-4),
        training=replace(run.training, micro_batch_size=4),
    )


def metro_xl() -> RunConfig:
    """METRO XL: large++ at width 2048 with 32 heads and a generator of 8 layers, about 3 billion parameters."""
    run = metro_large_plus_plus()
    return replace(
        run,
        model=replace(
            run.model, generator_num_layers=8, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=32
        ),
    )


def t5_metro_base() -> RunConfig:
    """The METRO paper's control at base: METRO's encoder-decoder alone, trained as a T5 (reference section 5)."""
    return _train_as_t5(metro_base())


def t5_metro_base_plus_plus() -> RunConfig:
    """The METRO paper's control at base++: 64k vocabulary, 2,000,000 steps, no clipping; it too ran in FP16."""
    run = _train_as_t5(metro_base_plus_plus())
    return replace(run, optimizer=replace(run.optimizer, clip_grad=0.0, bf16=False))


def fine_tuning() -> RunConfig:
    """What tools/finetune.py starts from: text-to-text on the weights of a checkpoint, its architecture and tokenizer.

    The rate suits batches of a few dozen examples; METRO-T0 took 4e-5 at base size (reference section 6).
    """
    run = RunConfig()
    return replace(
        run,
        objective=replace(run.objective, objective="text-to-text"),
        optimizer=replace(run.optimizer, lr=1e-4, lr_warmup_iters=0, clip_grad=1.0),
        training=replace(run.training, train_iters=1000, eval_interval=100),
        checkpoint=replace(run.checkpoint, use_checkpoint_args=True, exit_on_missing_checkpoint=True),
    )


def _train_as_t5(run: RunConfig) -> RunConfig:
    return replace(
        run,
        model=replace(run.model, generator_num_layers=0, rtd_head="none", generator_embedding_sharing="token"),
        objective=replace(run.objective, objective="t5-metro"),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "metro-tiny": metro_tiny,
    "metro-base": metro_base,
    "metro-base++": metro_base_plus_plus,
    "metro-large++": metro_large_plus_plus,
    "metro-xl": metro_xl,
    "t5-metro-base": t5_metro_base,
    "t5-metro-base++": t5_metro_base_plus_plus,
    "t5-small": presets_t5.t5_small,
    "t5-base": presets_t5.t5_base,
    "t5-large": presets_t5.t5_large,
    "t5-3b": presets_t5.t5_3b,
    "t5-11b": presets_t5.t5_11b,
    "t5-v1.1-small": presets_t5.t5_v1_1_small,
    "t5-v1.1-base": presets_t5.t5_v1_1_base,
    "t5-v1.1-large": presets_t5.t5_v1_1_large,
    "t5-v1.1-xl": presets_t5.t5_v1_1_xl,
    "t5-v1.1-xxl": presets_t5.t5_v1_1_xxl,
    "spactor-base": presets_t5.spactor_base,
    "spactor-large": presets_t5.spactor_large,
}
