"""Megatron's flags that are not fields of the schema: what each one means here.

A flag stands in exactly one table. `SHORTHANDS` and `SPELLINGS` set fields of the schema. `IGNORED` only warns, because
nothing is lost: the run already does what the flag asks, or the flag merely adds to the report. `FIXED` accepts the
values that describe what the run does and refuses others. `REFUSED` always stops the run and says what to do instead.
"""

import logging
from collections.abc import Sequence

from megatron_metro.config.errors import ConfigError
from megatron_metro.config.fields import shorten

LOGGER = logging.getLogger(__name__)

# One value for several fields; a flag of its own for one of them wins.
SHORTHANDS: dict[str, tuple[str, ...]] = {"--num-layers": ("encoder_num_layers", "decoder_num_layers")}

# A flag without a value that stands for a field and its value.
SPELLINGS: dict[str, tuple[str, str]] = {"--recompute-activations": ("recompute_granularity", "selective")}

_BALANCED = "layers are balanced over stages by cost, embeddings and heads included"
_REPORTED = "the log line, metrics.jsonl and --tensorboard-dir show what there is"

IGNORED: dict[str, str] = {
    "--account-for-embedding-in-pipeline-split": _BALANCED,
    "--account-for-loss-in-pipeline-split": _BALANCED,
    "--pipeline-model-parallel-split-rank": _BALANCED + "; encoder and decoder may share a stage",
    "--use-cpu-initialization": "initial weights depend on --seed and the parameter's name only, on every device",
    "--calculate-per-token-loss": "losses are always averaged over the tokens of the global batch",
    "--attention-softmax-in-fp32": "the attention softmax always runs in FP32",
    "--accumulate-allreduce-grads-in-fp32": "gradients are accumulated and reduced in FP32 under --bf16 and --fp16 too",
    "--no-gradient-accumulation-fusion": "gradient accumulation is not fused into the matrix products",
    "--no-save-rng": "checkpoints always hold the random states, a few kilobytes per rank",
    "--dist-ckpt-optim-fully-reshardable": "every checkpoint loads at every layout",
    "--auto-detect-ckpt-format": "there is one checkpoint format, torch_dist",
    "--test-data-path": "pretraining has no test pass",
    "--log-num-zeros-in-grad": _REPORTED,
    "--log-timers-to-tensorboard": _REPORTED,
    "--log-memory-to-tensorboard": _REPORTED,
    "--log-validation-ppl-to-tensorboard": _REPORTED,
    "--timing-log-level": _REPORTED,
    "--timing-log-option": _REPORTED,
    "--log-progress": _REPORTED,
    "--use-mcore-models": "models are always built on megatron-core",
}

FIXED: dict[str, tuple[tuple[str, ...], str]] = {
    "--context-parallel-size": (("1",), "sequences of encoder-decoder models are not split over ranks"),
    "--num-distributed-optimizer-instances": (("1",), "the optimizer is sharded over all data-parallel ranks"),
    "--transformer-impl": (("local",), "layers are built from megatron-core's local modules"),
    "--attention-backend": (("auto", "local", "unfused"), "the relative bias needs unfused attention"),
    "--ckpt-format": (("torch_dist",), "checkpoints are sharded and load at every layout"),
    "--dataloader-type": (("single",), "samples come in one order that every layout shares"),
}

_LAYOUT = "cut the stages by hand with --pipeline-model-parallel-layout, or leave them to be balanced"
_SENTENCEPIECE = "give a SentencePiece model with --tokenizer-model (tools/train_tokenizer.py makes one)"
_FP8 = "FP8 is not supported; give --bf16"
_CONFIG_FILE = "write the paths into a file and give it with --config"
_LAYER_RECOMPUTE = "--recompute-granularity full recomputes every layer, selective the attention scores"
_CKPT_CONVERT = "there is one checkpoint format, torch_dist, which loads at every layout"
_ONE_SAVE = "checkpoints are written to --save only; set --save-interval, and --async-save to go on meanwhile"
_WANDB = "Weights & Biases is not supported; read <save>/metrics.jsonl or give --tensorboard-dir"
_PROFILE = "there is no profiler; tools/benchmark.py times steps"

REFUSED: dict[str, str] = {
    "--num-layers-per-virtual-pipeline-stage": "give --num-virtual-stages-per-pipeline-rank",
    "--decoder-first-pipeline-num-layers": _LAYOUT,
    "--decoder-last-pipeline-num-layers": _LAYOUT,
    "--encoder-pipeline-model-parallel-size": "add its stages to --pipeline-model-parallel-size, which counts all",
    "--microbatch-group-size-per-virtual-pipeline-stage": "it always equals --pipeline-model-parallel-size",
    "--cp-comm-type": "there is no context parallelism",
    "--tp-comm-overlap": "it needs Transformer Engine's user buffers, which are not used",
    "--fake-process-group": "tools/plan.py shows a layout without processes",
    "--swiglu": "T5 v1.1 has --activation gated-gelu, METRO --activation relu",
    "--data-args-path": _CONFIG_FILE,
    "--per-split-data-args-path": _CONFIG_FILE,
    "--mock-data": "examples/quickstart.sh makes real data from any text, offline",
    "--short-seq-prob": "blocks are full, or whole lines with --block-mode complete_doc",
    "--no-mmap-bin-files": "token files are always memory-mapped",
    "--vocab-file": _SENTENCEPIECE,
    "--merge-file": _SENTENCEPIECE,
    "--lr-warmup-fraction": "give --lr-warmup-iters",
    "--lr-warmup-samples": "give --lr-warmup-iters",
    "--fp8-format": _FP8,
    "--fp8-recipe": _FP8,
    "--fp8-amax-history-len": _FP8,
    "--fp8-amax-compute-algo": _FP8,
    "--fp8-param-gather": _FP8,
    "--first-last-layers-bf16": _FP8,
    "--recompute-method": _LAYER_RECOMPUTE,
    "--recompute-num-layers": _LAYER_RECOMPUTE,
    "--recompute-modules": _LAYER_RECOMPUTE,
    "--distribute-saved-activations": "give --sequence-parallel, which shards all activations",
    "--use-persistent-ckpt-worker": _ONE_SAVE,
    "--non-persistent-save-interval": _ONE_SAVE,
    "--non-persistent-ckpt-type": _ONE_SAVE,
    "--dist-ckpt-strictness": "a checkpoint must hold exactly what the model needs",
    "--ckpt-convert-format": _CKPT_CONVERT,
    "--ckpt-convert-save": _CKPT_CONVERT,
    "--wandb-project": _WANDB,
    "--wandb-exp-name": _WANDB,
    "--wandb-save-dir": _WANDB,
    "--wandb-entity": _WANDB,
    "--profile": _PROFILE,
    "--profile-step-start": _PROFILE,
    "--profile-step-end": _PROFILE,
    "--use-pytorch-profiler": _PROFILE,
    "--skip-train": "validation runs after a training step; see --eval-interval and --eval-iters",
    "--full-validation": "give the number of validation batches with --eval-iters",
}


def list_foreign_flags() -> tuple[str, ...]:
    """Flags that set nothing: ignored, accepted with some values, or refused."""
    return (*IGNORED, *FIXED, *REFUSED)


def is_foreign_flag(flag: str) -> bool:
    """Whether Megatron has this flag and we set nothing by it."""
    return flag in IGNORED or flag in FIXED or flag in REFUSED


def judge_foreign_flag(flag: str, label: str, words: Sequence[str] | None) -> None:
    """Warn about an ignored flag, pass a fixed one with a legal value, raise ConfigError for anything else.

    `label` says where the flag was found. Warnings go to this module's logger, so a rank can be silent.
    """
    if flag in REFUSED:
        raise ConfigError(f"{label} is not supported: {REFUSED[flag]}")
    if flag in IGNORED:
        LOGGER.warning("%s is ignored: %s", label, IGNORED[flag])
        return
    legal, reason = FIXED[flag]
    if not words or len(words) != 1 or words[0] not in legal:
        found = " ".join(shorten(word) for word in words or ()) or "no value"
        raise ConfigError(f"{label}: {found} is not supported ({reason}); give {' or '.join(legal)}")
