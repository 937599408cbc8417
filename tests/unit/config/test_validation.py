"""Checks across settings: what is refused, with what fix; what is filled in; batch arithmetic."""

import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_metro.config.batches import batch_size_at, count_steps, list_batch_sizes
from megatron_metro.config.blend import parse_blend, parse_split
from megatron_metro.config.cli import parse_run, read_run
from megatron_metro.config.errors import ConfigError
from megatron_metro.config.objectives import OBJECTIVES
from megatron_metro.config.schema import RunConfig, TrainingConfig
from megatron_metro.config.validation import data_parallel_size, require_training_inputs, resolve, validate

T5 = "--objective t5-span --generator-num-layers 0"
GOOD = [  # processes, words on top of metro-tiny
    *((1, f"--objective {name}") for name in OBJECTIVES),
    (1, "--mask-spans --lm-targets all"),
    (1, "--lm-targets masked-only --weighted-lm-loss"),
    (1, "--objective t5-metro --lm-targets all --block-mode complete_doc"),
    (1, "--objective spactor --generator-num-layers 0"),
    (1, "--objective electra --encoder-lm-head --copy-mechanism --lm-head roberta"),
    (1, "--objective electra --encoder-lm-head --lm-targets all --lm-head roberta"),
    (1, "--rtd-position decoder --lm-targets all --copy-mechanism"),
    (1, "--objective spactor --lm-head roberta --spactor-normalisation mean"),
    (1, T5),
    (1, f"{T5} --encoder-seq-length 512 --decoder-seq-length 114"),
    (4, "--tensor-model-parallel-size 4 --sequence-parallel"),
    (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 5"),
    (3, "--pipeline-model-parallel-size 3 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 12"),
    (1, "--hidden-size 60 --num-attention-heads 7 --kv-channels 16"),
    (1, "--generator-hidden-size 32 --generator-num-attention-heads 2 --generator-ffn-hidden-size 100"),
    (4, "--tensor-model-parallel-size 4 --generator-num-layers 0 --generator-num-attention-heads 2"),
    (1, "--rtd-head gelu --rtd-head-hidden-size 96 --mlm-head linear --untie-mlm-head"),
    (1, "--position-embedding-type none --encoder-seq-length 4096"),
    (1, "--generator-num-layers 0"),
    (2, "--rampup-batch-size 8 8 100 --global-batch-size 32 --train-iters none --train-samples 4000"),
    (1, "--relative-attention none --relative-attention-num-buckets 5"),
    (1, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    (1, "--split 100,0,0 --data-path x --eval-iters 0"),
    (1, "--train-data-path 1 x 2 y --valid-data-path z"),
]
BAD = [  # processes, words on top of metro-tiny, parts of the message
    (3, "--tensor-model-parallel-size 2", ["--tensor-model-parallel-size 2", "multiple of 2", "found 3", "2 or 4"]),
    (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 3", ["multiple of 6", "found 4", "start 6"]),
    (0, "", ["found 0"]),
    (8, "--tensor-model-parallel-size 8", ["--num-attention-heads 4", "size 8", "give 8 heads", "size 4"]),
    (3, "--tensor-model-parallel-size 3", ["--num-attention-heads 4", "3 or 6 heads", "size 2 or 4"]),
    (4, "--tensor-model-parallel-size 4 --ffn-hidden-size 250", ["--ffn-hidden-size 250", "248 or 252"]),
    (1, "--hidden-size 66", ["--hidden-size 66", "--num-attention-heads 4", "3 or 6 heads", "--kv-channels"]),
    (
        1,
        "--generator-hidden-size 30",
        ["--generator-hidden-size 30 is not a multiple of --num-attention-heads 4", "3 or 5 heads"],
    ),
    (
        4,
        "--tensor-model-parallel-size 4 --generator-num-attention-heads 2",
        ["--generator-num-attention-heads 2 is not a multiple of --tensor-model-parallel-size 4", "size 2"],
    ),
    (
        4,
        "--tensor-model-parallel-size 4 --generator-ffn-hidden-size 90",
        ["--generator-ffn-hidden-size 90", "88 or 92"],
    ),
    (1, "--rtd-head-hidden-size 96", ["--rtd-head-hidden-size 96", "found --rtd-head roberta", "--rtd-head gelu"]),
    (1, "--make-vocab-size-divisible-by 200", ["--make-vocab-size-divisible-by 200", "128 or 256"]),
    (1, "--sequence-parallel", ["--sequence-parallel", "--tensor-model-parallel-size", "found 1"]),
    (
        4,
        "--tensor-model-parallel-size 4 --sequence-parallel --encoder-seq-length 126",
        ["--encoder-seq-length 126", "124 or 128", "--no-sequence-parallel"],
    ),
    (
        4,
        f"{T5} --encoder-seq-length 512 --tensor-model-parallel-size 4 --sequence-parallel",
        ["--decoder-seq-length 114", "size of 3 or 6"],
    ),
    (1, "--encoder-seq-length 2048", ["--encoder-seq-length 2048", "--max-position-embeddings 1024", "2048"]),
    (1, "--decoder-seq-length 64", ["--decoder-seq-length 64", "--encoder-seq-length 128", "give 128"]),
    (1, f"{T5} --decoder-seq-length 128", ["--decoder-seq-length 128", "t5-span", "leave it out"]),
    (1, "--objective t5-span --generator-num-layers 2", ["t5-span", "--generator-num-layers 2", "give 0"]),
    (1, "--objective electra --generator-num-layers 0", ["electra", "--generator-num-layers 0", "at least 1"]),
    (1, "--objective t5-span --lm-targets all", ["t5-span", "--lm-targets all", "give masked"]),
    (1, "--objective t5-metro --lm-targets masked-only", ["t5-metro", "masked-only", "give masked or all"]),
    (1, "--objective electra --lm-targets masked-only", ["electra", "masked-only", "give masked or all"]),
    (1, "--objective electra --decoder-num-layers 2", ["electra", "no decoder", "--decoder-num-layers 2", "give 0"]),
    (1, "--decoder-num-layers 0", ["metro", "needs a decoder", "--decoder-num-layers 0", "at least 1"]),
    (1, "--objective electra --rtd-head none", ["electra", "--rtd-head none", "--encoder-lm-head"]),
    (1, "--objective electra --rtd-position decoder", ["electra", "on the decoder", "--encoder-lm-head"]),
    (1, "--encoder-lm-head", ["--encoder-lm-head", "--decoder-num-layers 2", "--objective electra"]),
    (1, "--objective electra --copy-mechanism", ["--copy-mechanism", "electra", "--encoder-lm-head"]),
    (1, "--objective electra --lm-head roberta", ["--lm-head roberta", "electra", "--encoder-lm-head"]),
    (1, "--lm-head roberta --scale-lm-output", ["--lm-head roberta", "--scale-lm-output", "drop one"]),
    (
        1,
        "--objective spactor --rtd-position decoder",
        ["--rtd-position decoder", "spactor", "give --rtd-position encoder"],
    ),
    (1, "--lm-targets masked-only --rtd-position decoder", ["--rtd-position decoder", "masked-only"]),
    (1, "--lm-targets all --copy-mechanism", ["--copy-mechanism", "--lm-targets all", "--rtd-position decoder"]),
    (1, "--eval-all-positions --copy-mechanism", ["--copy-mechanism", "eval-all-positions True", "decoder"]),
    (1, "--rtd-head none --copy-mechanism", ["--copy-mechanism", "--rtd-head none", "drop it"]),
    (1, "--objective spactor --copy-mechanism", ["--copy-mechanism", "spactor", "drop it"]),
    (1, "--generator-num-layers 0 --copy-mechanism", ["--copy-mechanism", "--generator-num-layers 0", "drop it"]),
    (1, "--objective spactor --eval-all-positions", ["--eval-all-positions", "spactor", "drop it"]),
    (1, "--lm-targets masked-only --eval-all-positions", ["--eval-all-positions", "masked-only", "drop it"]),
    (1, "--objective spactor --mask-spans", ["--mask-spans", "spactor", "drop it"]),
    (1, "--lm-targets all --weighted-lm-loss", ["--weighted-lm-loss", "metro", "--lm-targets all", "drop it"]),
    (1, "--objective spactor --weighted-lm-loss", ["--weighted-lm-loss", "spactor", "drop it"]),
    (1, "--objective t5-iid --vocab-extra-ids 10", ["--vocab-extra-ids 10", "20 spans", "at least 21"]),
    (1, "--objective spactor --vocab-extra-ids 4", ["--vocab-extra-ids 4", "7 spans", "at least 8"]),
    (1, "--objective t5-metro --vocab-extra-ids 7", ["--vocab-extra-ids 7", "9 spans", "at least 10"]),
    (1, "--objective deshuffle --block-mode complete_doc", ["deshuffle", "complete_doc", "give full"]),
    (1, "--objective spactor --spactor-mask-prob 0", ["--spactor-mask-prob: 0"]),
    (1, f"{T5} --lm-loss-weight 0", ["--lm-loss-weight 0"]),
    (1, f"{T5} --block-mode complete_doc", ["t5-span", "complete_doc"]),
    (1, f"{T5} --vocab-extra-ids 4", ["--vocab-extra-ids 4", "7 spans", "at least 8"]),
    (1, "--global-batch-size 10", ["--global-batch-size 10", "--micro-batch-size 4 x 1", "8 or 12"]),
    (3, "", ["--global-batch-size 16", "= 12", "12 or 24"]),
    (1, "--global-batch-size 2", ["--global-batch-size 2", "give 4"]),
    (1, "--rampup-batch-size 4 5 100", ["--rampup-batch-size 4 5 100", "--global-batch-size 16", "divides"]),
    (1, "--rampup-batch-size 16 4 100", ["--rampup-batch-size", "below 16"]),
    (1, "--rampup-batch-size 2 2 100", ["--rampup-batch-size", "2 is not a multiple", "give 4"]),
    (1, "--train-samples 100", ["--train-iters 1000", "--train-samples 100", "give one"]),
    (1, "--train-iters none --train-samples 10", ["--train-samples 10", "at least 16"]),
    (1, "--train-iters 20", ["--lr-warmup-iters 20", "--lr-decay-iters 20", "give --lr-warmup-iters 2"]),
    (1, "--lr-decay-iters 10", ["--lr-warmup-iters 20", "--lr-decay-iters 10"]),
    (1, "--optimizer adafactor --use-distributed-optimizer", ["--use-distributed-optimizer", "--optimizer adafactor"]),
    (1, "--min-lr 1", ["--min-lr 1", "--lr 0.001"]),
    (
        2,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 6",
        ["12 pieces", "11 units", "most 5"],
    ),
    (12, "--pipeline-model-parallel-size 12", ["12 pieces", "11 units", "11 stages"]),
    (1, "--num-virtual-stages-per-pipeline-rank 2", ["--num-virtual-stages-per-pipeline-rank 2", "at least 2 stages"]),
    (
        2,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --no-overlap-p2p-communication",
        ["--no-overlap-p2p-communication", "--pipeline-model-parallel-size 2", "3 stages"],
    ),
    (
        2,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 12",
        ["multiples of 2, found 3", "12", "multiples of 8"],
    ),
    (
        2,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --rampup-batch-size 4 4 100",
        ["found 1 at global batch size 4"],
    ),
    (1, "--overlap-param-gather", ["--overlap-param-gather", "--use-distributed-optimizer and --overlap-grad-reduce"]),
    (1, "--overlap-param-gather --overlap-grad-reduce", ["needs --use-distributed-optimizer, not found"]),
    (1, "--bf16 --fp16", ["--bf16 and --fp16"]),
    (1, "--loss-scale 8", ["--loss-scale 8", "--fp16"]),
    (1, "--fp16 --initial-loss-scale 1 --min-loss-scale 2", ["--initial-loss-scale 1", "--min-loss-scale 2"]),
    (1, "--device cpu --distributed-backend nccl", ["--distributed-backend nccl", "--device cpu", "gloo"]),
    (1, "--mask-token-prob 0.9 --mask-random-prob 0.2", ["--mask-token-prob 0.9", "--mask-random-prob 0.2", "1.1"]),
    (1, "--mlm-loss-weight 0 --rtd-loss-weight 0 --lm-loss-weight 0", ["all 0"]),
    (1, "--weighted-lm-loss --rtd-head none", ["--weighted-lm-loss", "--rtd-head none"]),
    (1, "--weighted-lm-loss --generator-num-layers 0", ["--weighted-lm-loss", "--generator-num-layers 0"]),
    (1, "--vocab-size 100", ["--vocab-size 100", "--vocab-extra-ids 128"]),
    (1, "--relative-attention-num-buckets 30", ["--relative-attention-num-buckets 30", "28 or 32"]),
    (1, "--relative-attention-max-distance 9", ["--relative-attention-max-distance 9", "at least 10"]),
    (1, "--relative-attention-decoder --relative-attention none", ["--relative-attention-decoder"]),
    (1, "--scale-lm-output --untie-embeddings-and-output-weights", ["--scale-lm-output", "--untie"]),
    (
        1,
        "--generator-embedding-sharing token_pos_norm --norm-placement pre",
        ["token_pos_norm", "--norm-placement pre"],
    ),
    (1, "--data-path x --train-data-path y", ["--data-path and --train-data-path"]),
    (1, "--valid-data-path y", ["--valid-data-path", "--train-data-path"]),
    (1, "--train-data-path y", ["--eval-iters 10", "--valid-data-path", "--eval-iters 0"]),
    (1, "--data-path x --split 100,0,0", ["--eval-iters 10", "--split 100,0,0"]),
    (1, "--split 1,2", ["--split", "'1,2'", "969,30,1"]),
    (1, "--split 1,-2,3", ["--split"]),
    (1, "--split 0,1,1", ["--split", "first above 0"]),
    (1, "--split a,b,c", ["--split"]),
    (1, "--data-path 0 x", ["--data-path", "'x' has weight 0"]),
    (1, "--data-path nan x", ["--data-path", "weight nan"]),
    (1, "--data-path -1 x", ["--data-path", "weight -1"]),
    (1, "--data-path 1 x 2", ["--data-path", "2 weights in 3 values"]),
    (1, "--data-path 1 x y z", ["--data-path", "1 weights in 4 values"]),
    (1, "--data-path x 1 y 2", ["--data-path", "'1' after a prefix"]),
    (1, "--data-path 1 2", ["--data-path", "'2' where a prefix belongs"]),
    (1, "--save-interval 10", ["--save-interval", "--save FOLDER"]),
    (1, "--no-save-optim", ["--no-save-optim", "--save"]),
    (1, "--ckpt-step 10", ["--ckpt-step", "--load"]),
    (1, "--async-save", ["--async-save needs --save"]),
    (1, "--keep-last 2", ["--keep-last needs --save"]),
    (1, "--save-retain-interval 20", ["--save-retain-interval needs --save"]),
    (1, "--skip-damaged-checkpoints", ["--skip-damaged-checkpoints needs --load"]),
    (1, "--save x --save-interval 10 --save-retain-interval 25", ["--save-retain-interval 25", "give 20 or 30"]),
    (1, "--finetune", ["--finetune", "--load"]),
    (1, "--no-load-optim", ["--no-load-optim", "--load"]),
    (1, "--exit-on-missing-checkpoint", ["--exit-on-missing-checkpoint", "--load"]),
    (1, "--no-load-rng", ["--no-load-rng", "--load"]),
    (1, "--use-checkpoint-args", ["--use-checkpoint-args", "--load"]),
    (1, "--override-data", ["--override-data", "--load"]),
    (
        1,
        "--load run --override-opt-param-scheduler --use-checkpoint-opt-param-scheduler",
        ["--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"],
    ),
]


@pytest.mark.parametrize(("world_size", "words"), GOOD, ids=[words for _, words in GOOD])
def test_good_runs_pass(world_size, words):
    run = parse_run(["--preset", "metro-tiny", *words.split()], world_size)
    assert resolve(run, world_size) == run and run.training.global_batch_size is not None


@pytest.mark.parametrize(("world_size", "words", "parts"), BAD, ids=[f"{n} {words}" for n, words, _ in BAD])
def test_bad_runs_are_refused_in_one_line(world_size, words, parts):
    with pytest.raises(ConfigError) as refusal:
        parse_run(["--preset", "metro-tiny", *words.split()], world_size)
    message = str(refusal.value)
    assert len(message.splitlines()) == 1
    assert all(part in message for part in parts), message


def test_values_set_in_code_are_checked_too():
    run = RunConfig()
    for model, part in (
        (replace(run.model, hidden_dropout=float("nan")), "--hidden-dropout"),
        (replace(run.model, hidden_size=-1), "--hidden-size"),
        (replace(run.model, rtd_head="big"), "--rtd-head"),
        (replace(run.model, hidden_size=None), "--hidden-size"),
    ):
        with pytest.raises(ConfigError, match=f"^{part}: "):
            validate(replace(run, model=model), 1)


def test_verdicts_do_not_depend_on_asserts():
    code = (
        "from megatron_metro.config.cli import parse_run\n"
        "from megatron_metro.config.errors import exit_on_error\n"
        "with exit_on_error(): parse_run(['--sequence-parallel'], 1)"
    )
    result = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 64
    assert result.stderr.startswith("error: --sequence-parallel needs --tensor-model-parallel-size above 1")
    assert result.stderr.count("\n") == 1


def test_t5_lengths_are_derived():
    run = parse_run(["--preset", "metro-tiny", *T5.split(), "--encoder-seq-length", "512"], 1)
    assert run.data.decoder_seq_length == 114


def test_data_parallel_size():
    parallel = read_run(["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]).parallel
    assert data_parallel_size(parallel, 12) == 3


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--train-iters none", "--train-iters"),
        ("", "--data-path"),
        ("--data-path x", "--tokenizer-model"),
        ("--data-path x --tokenizer-model t.bin", "--tokenizer-type"),
        ("--data-path x --tokenizer-type NullTokenizer", "--vocab-size"),
    ],
)
def test_training_needs_a_length_data_and_a_tokenizer(words, part):
    run = parse_run(["--preset", "metro-tiny", *words.split()], 1)
    with pytest.raises(ConfigError, match=part):
        require_training_inputs(run)
    complete = ["--preset", "metro-tiny", "--data-path", "x", "--tokenizer-model", "t.model"]
    require_training_inputs(parse_run(complete, 1))


def test_blends():
    assert parse_blend(("30", "a", "70", "b"), "--data-path") == ((30.0, "a"), (70.0, "b"))
    assert parse_blend(("a", "b", "c"), "--data-path") == ((None, "a"), (None, "b"), (None, "c"))
    assert parse_blend(("5",), "--data-path") == ((None, "5"),)
    assert parse_blend((), "--data-path") == ()
    assert parse_split("98, 1,1") == (0.98, 0.01, 0.01)


def test_batch_sizes_along_a_ramp():
    training = TrainingConfig(global_batch_size=16, rampup_batch_size=(4, 4, 120), train_samples=200)
    assert list_batch_sizes(training) == (4, 8, 12, 16)
    assert [batch_size_at(training, n) for n in (0, 39, 40, 80, 119, 120, 121)] == [4, 4, 8, 12, 12, 16, 16]
    assert list_batch_sizes(TrainingConfig(global_batch_size=16)) == (16,)


@pytest.mark.parametrize("rampup", [(), (4, 4, 120), (1, 3, 7), (8, 8, 1), (2, 1, 333)])
@pytest.mark.parametrize("train_samples", [1, 15, 16, 17, 100, 119, 120, 121, 128, 500])
def test_steps_are_counted_as_they_are_taken(rampup, train_samples):
    training = TrainingConfig(global_batch_size=16, rampup_batch_size=rampup, train_samples=train_samples)
    consumed = num_steps = 0
    while consumed + batch_size_at(training, consumed) <= train_samples:
        consumed += batch_size_at(training, consumed)
        num_steps += 1
    assert count_steps(training) == num_steps


def test_a_run_of_absurd_length_is_counted_at_once():
    huge = TrainingConfig(global_batch_size=16, rampup_batch_size=(4, 4, 10**17), train_samples=10**17)
    assert count_steps(huge) > 10**15
    assert count_steps(TrainingConfig(global_batch_size=16)) is None
