"""Every flag a Megatron user may bring is supported, ignored with a warning, or refused by name."""

import logging

import pytest

from megatron_metro.config.cli import read_run
from megatron_metro.config.errors import ConfigError
from megatron_metro.config.fields import list_settings
from megatron_metro.config.flags import FIXED, IGNORED, REFUSED, SHORTHANDS, SPELLINGS

# The flags of megatron-core 0.16.1's training arguments that concern pretraining, and two historic ones.
FLAGS_TEXT = """
--tensor-model-parallel-size --pipeline-model-parallel-size --num-layers-per-virtual-pipeline-stage
--num-virtual-stages-per-pipeline-rank --pipeline-model-parallel-layout --decoder-first-pipeline-num-layers
--decoder-last-pipeline-num-layers --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split
--microbatch-group-size-per-virtual-pipeline-stage --sequence-parallel --context-parallel-size --cp-comm-type
--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --num-distributed-optimizer-instances
--tp-comm-overlap --distributed-backend --distributed-timeout-minutes --fake-process-group --use-cpu-initialization
--pipeline-model-parallel-split-rank --encoder-pipeline-model-parallel-size
--encoder-num-layers --decoder-num-layers --num-layers --hidden-size --ffn-hidden-size --num-attention-heads
--kv-channels --encoder-seq-length --decoder-seq-length --seq-length --max-position-embeddings
--position-embedding-type --relative-attention-num-buckets --relative-attention-max-distance --normalization
--norm-epsilon --swiglu --disable-bias-linear --untie-embeddings-and-output-weights --make-vocab-size-divisible-by
--init-method-std --hidden-dropout --attention-dropout --transformer-impl --attention-backend
--data-path --split --train-data-path --valid-data-path --test-data-path --data-args-path --per-split-data-args-path
--data-cache-path --mock-data --num-workers --dataloader-type --mask-prob --short-seq-prob --no-mmap-bin-files
--tokenizer-type --tokenizer-model --vocab-file --merge-file --vocab-size --vocab-extra-ids
--micro-batch-size --global-batch-size --rampup-batch-size --train-iters --train-samples --exit-interval
--exit-duration-in-mins --exit-signal-handler --seed --deterministic-mode --calculate-per-token-loss
--optimizer --lr --min-lr --lr-decay-style --lr-decay-iters --lr-warmup-iters --lr-warmup-fraction
--lr-warmup-samples --weight-decay --clip-grad --adam-beta1 --adam-beta2 --adam-eps --override-opt-param-scheduler
--use-checkpoint-opt-param-scheduler
--bf16 --fp16 --loss-scale --initial-loss-scale --fp8-format --fp8-recipe --fp8-amax-history-len
--fp8-amax-compute-algo --fp8-param-gather --first-last-layers-bf16 --attention-softmax-in-fp32
--accumulate-allreduce-grads-in-fp32 --no-gradient-accumulation-fusion
--recompute-activations --recompute-granularity --recompute-method --recompute-num-layers --recompute-modules
--distribute-saved-activations
--save --load --save-interval --save-retain-interval --ckpt-format --ckpt-step --finetune --pretrained-checkpoint
--no-save-optim --no-save-rng --no-load-optim --no-load-rng --use-checkpoint-args --exit-on-missing-checkpoint
--async-save --use-persistent-ckpt-worker --dist-ckpt-strictness --dist-ckpt-optim-fully-reshardable
--ckpt-convert-format --ckpt-convert-save --auto-detect-ckpt-format --non-persistent-save-interval
--non-persistent-ckpt-type
--log-interval --tensorboard-dir --log-throughput --log-params-norm --log-num-zeros-in-grad
--log-timers-to-tensorboard --log-memory-to-tensorboard --log-validation-ppl-to-tensorboard --timing-log-level
--timing-log-option --log-progress --wandb-project --wandb-exp-name --wandb-save-dir --wandb-entity --profile
--profile-step-start --profile-step-end --use-pytorch-profiler --eval-interval --eval-iters --skip-train
--full-validation
"""
MEGATRON_FLAGS = FLAGS_TEXT.split()

SUPPORTED = {spelling for setting in list_settings().values() for spelling in (*setting.flags, *setting.negatives)}
TABLES = [SUPPORTED, set(SHORTHANDS), set(SPELLINGS), set(IGNORED), set(FIXED), set(REFUSED)]


def test_every_megatron_flag_stands_in_exactly_one_table():
    places = {flag: sum(flag in table for table in TABLES) for flag in MEGATRON_FLAGS}
    assert {flag: count for flag, count in places.items() if count != 1} == {}


def test_no_flag_stands_in_two_tables():
    flags = [flag for table in TABLES for flag in table]
    assert len(flags) == len(set(flags))


def test_no_two_settings_share_a_spelling():
    spellings = [s for setting in list_settings().values() for s in (*setting.flags, *setting.negatives)]
    assert len(spellings) == len(set(spellings))


def test_reasons_name_flags_that_exist():
    reasons = [*IGNORED.values(), *REFUSED.values(), *(reason for _, reason in FIXED.values())]
    named = {word.strip(",.;:()") for reason in reasons for word in reason.split() if word.startswith("--")}
    assert named <= SUPPORTED | {"--config", "--preset"}


@pytest.mark.parametrize("flag", IGNORED)
@pytest.mark.parametrize("words", [(), ("7",)])
def test_an_ignored_flag_warns_and_changes_nothing(flag, words, caplog):
    with caplog.at_level(logging.WARNING):
        assert read_run([flag, *words]) == read_run([])
    assert [record.getMessage() for record in caplog.records] == [f"{flag} is ignored: {IGNORED[flag]}"]


@pytest.mark.parametrize("flag", REFUSED)
def test_a_refused_flag_says_why(flag):
    with pytest.raises(ConfigError, match=f"^{flag} is not supported: "):
        read_run([flag, "7"])


@pytest.mark.parametrize("flag", FIXED)
def test_a_fixed_flag_takes_only_what_is_true(flag, caplog):
    for value in FIXED[flag][0]:
        assert read_run([flag, value]) == read_run([])
    assert not caplog.records
    with pytest.raises(ConfigError, match=f"^{flag}: 'wrong' is not supported .*give {FIXED[flag][0][0]}"):
        read_run([flag, "wrong"])
    with pytest.raises(ConfigError, match=f"^{flag}: no value"):
        read_run([flag])


def test_recompute_activations_is_the_selective_granularity():
    assert read_run(["--recompute-activations"]).parallel.recompute_granularity == "selective"


def test_num_layers_sets_both_depths_unless_one_is_given():
    model = read_run(["--num-layers", "6"]).model
    assert (model.encoder_num_layers, model.decoder_num_layers) == (6, 6)
    model = read_run(["--decoder-num-layers", "3", "--num-layers", "6"]).model
    assert (model.encoder_num_layers, model.decoder_num_layers) == (6, 3)


def test_historic_spellings():
    run = read_run(["--model-parallel-size", "2", "--batch-size", "4", "--seq-length", "128"])
    found = (run.parallel.tensor_model_parallel_size, run.training.micro_batch_size, run.data.encoder_seq_length)
    assert found == (2, 4, 128)
