"""A METRO small enough for hundreds of parity runs, and random global batches for it, as plain functions of a seed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megatron_metro.batch import Microbatch
from megatron_metro.config.schema import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig, RunConfig

VOCAB_SIZE = 300  # not a multiple of 128: the last rank holds padded rows
LENGTH = 16
NUM_SLOTS = 8
PAD_ID = 1
FEW_IDS = 6

# Other architectures, as changes of the tiny model.
T5_V1_0: dict[str, Any] = {
    "generator_num_layers": 0,
    "rtd_head": "none",
    "norm_placement": "pre",
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "add_bias_linear": False,
    "softmax_scale": 1.0,
    "position_embedding_type": "none",
    "relative_attention": "per_stack",
    "relative_attention_decoder": True,
    "relative_attention_bucket": "t5",
    "scale_lm_output": True,
}
T5_V1_1 = {**T5_V1_0, "activation": "gated-gelu", "untie_embeddings_and_output_weights": True, "scale_lm_output": False}
SPACTOR = {
    **T5_V1_0,
    "generator_num_layers": 2,
    "generator_ffn_hidden_size": 24,
    "mlm_head": "linear",
    "untie_mlm_head": True,
    "rtd_head": "gelu",
    "rtd_head_hidden_size": 20,
}
NARROW_GENERATOR = {"generator_hidden_size": 8, "generator_ffn_hidden_size": 12, "generator_num_attention_heads": 2}


def tiny_model(**changes: Any) -> ModelConfig:
    """Two layers per network of width 16 with every METRO part; dropout off."""
    small = ModelConfig(
        encoder_num_layers=2,
        decoder_num_layers=2,
        generator_num_layers=2,
        hidden_size=16,
        ffn_hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=32,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        vocab_size=VOCAB_SIZE,
    )
    return replace(small, **changes)


def tiny_run(
    model: ModelConfig | None = None,
    parallel: ParallelConfig | None = None,
    objective: ObjectiveConfig | None = None,
    **optimizer: Any,
) -> RunConfig:
    """A run of the tiny model: constant lr 1e-3 and clipping at 1.0 (design section 5)."""
    defaults = {"lr": 1e-3, "lr_decay_style": "constant", "lr_warmup_iters": 0, "clip_grad": 1.0}
    return RunConfig(
        model=model or tiny_model(),
        parallel=parallel or ParallelConfig(),
        objective=objective or ObjectiveConfig(),
        optimizer=OptimizerConfig(**{**defaults, **optimizer}),
    )


def metro_batch(num_sequences: int, seed: int, *, padded: bool = False) -> Microbatch:
    """A METRO batch [num_sequences, LENGTH]; with `padded`, blocks end early and carry a padding mask."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, VOCAB_SIZE, size=(num_sequences, LENGTH))
    lengths = rng.integers(LENGTH // 2, LENGTH + 1, size=num_sequences) if padded else np.full(num_sequences, LENGTH)
    padding = np.arange(LENGTH) >= lengths[:, None]
    tokens[padding] = PAD_ID
    slots = np.full((num_sequences, NUM_SLOTS), LENGTH)
    for row, length in enumerate(lengths):
        count = rng.integers(1, NUM_SLOTS)
        slots[row, :count] = np.sort(rng.choice(length, size=count, replace=False))
    valid = slots < LENGTH
    ids = np.where(valid, np.take_along_axis(tokens, np.minimum(slots, LENGTH - 1), axis=1), 0)
    generator_tokens = tokens.copy()
    rows, columns = np.nonzero(valid)
    generator_tokens[rows, slots[rows, columns]] = rng.integers(4, VOCAB_SIZE, size=len(rows))
    start = np.full((num_sequences, 1), 2)
    arrays = {
        "encoder_tokens": tokens,
        "decoder_tokens": np.concatenate([start, tokens[:, :-1]], axis=1),
        "generator_tokens": generator_tokens,
        "target_slots": slots,
        "target_ids": ids,
        "target_valid": valid,
        "masked_slots": slots,
        "masked_ids": ids,
        "masked_valid": valid,
        "uniforms": rng.random((num_sequences, NUM_SLOTS)),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Microbatch(**tensors, encoder_padding=torch.from_numpy(padding) if padded else None)


def span_batch(num_sequences: int, seed: int, *, decoder_length: int = 8) -> Microbatch:
    """A batch without a generator and with unequal lengths: all decoder positions are targets."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(4, VOCAB_SIZE, size=(num_sequences, decoder_length))
    start = np.full((num_sequences, 1), PAD_ID)
    every = np.broadcast_to(np.arange(decoder_length), targets.shape).copy()
    return Microbatch(
        encoder_tokens=torch.from_numpy(rng.integers(4, VOCAB_SIZE, size=(num_sequences, LENGTH))),
        decoder_tokens=torch.from_numpy(np.concatenate([start, targets[:, :-1]], axis=1)),
        target_slots=torch.from_numpy(every),
        target_ids=torch.from_numpy(targets),
        target_valid=torch.ones(num_sequences, decoder_length, dtype=torch.bool),
    )


def objective_batch(
    objective: ObjectiveConfig, num_sequences: int, seed: int, *, padded: bool = False, has_decoder: bool = True
) -> Microbatch:
    """A batch with a generator, as the objective and its `lm_targets` want decoder and targets."""
    batch = metro_batch(num_sequences, seed, padded=padded)
    assert batch.masked_valid is not None
    if objective.objective == "spactor":
        spans = span_batch(num_sequences, seed)
        names = ("decoder_tokens", "target_slots", "target_ids", "target_valid")
        return replace(batch, **{name: getattr(spans, name) for name in names})
    if objective.lm_targets == "all":
        tokens = batch.encoder_tokens
        is_real = torch.ones_like(tokens, dtype=torch.bool) if batch.encoder_padding is None else ~batch.encoder_padding
        every = torch.where(is_real, torch.arange(LENGTH), LENGTH)
        batch = replace(batch, target_slots=every, target_ids=tokens, target_valid=is_real)
    if objective.lm_targets == "masked-only":
        start = batch.target_ids.new_full((num_sequences, 1), 2)
        slots = torch.where(batch.masked_valid, torch.arange(NUM_SLOTS), NUM_SLOTS)
        tokens = torch.cat([start, batch.target_ids[:, :-1]], dim=1)
        batch = replace(batch, decoder_tokens=tokens, target_slots=slots)
    return batch if has_decoder else replace(batch, decoder_tokens=batch.decoder_tokens[:, :0])


def narrow(batch: Microbatch) -> Microbatch:
    """The same batch over few ids, some of which a generator that prefers these fills in where they were."""
    names = ("encoder_tokens", "decoder_tokens", "target_ids", "masked_ids")
    return replace(batch, **{name: 4 + getattr(batch, name) % FEW_IDS for name in names})


def prefer_few_ids(pieces: Sequence[torch.nn.Module], tp_rank: int = 0) -> None:
    """Let the generator prefer the ids of `narrow`, which the first tensor-parallel rank holds."""
    for piece in pieces:
        if tp_rank == 0 and hasattr(piece, "mlm_head"):
            with torch.no_grad():
                piece.mlm_head.output_bias[4 : 4 + FEW_IDS] += 6.0
