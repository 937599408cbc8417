"""Checks across settings before any process group starts: messages name flags, values found and what would work."""

from dataclasses import fields, replace

from megatron_metro.config.batches import count_steps, list_batch_sizes
from megatron_metro.config.blend import parse_blend, parse_split
from megatron_metro.config.chain import build_chain
from megatron_metro.config.fields import check_values
from megatron_metro.config.legal import nearest_multiples, require
from megatron_metro.config.model_checks import (
    check_architecture,
    check_heads,
    check_lengths,
    check_objective,
    check_widths,
    derive_decoder_length,
)
from megatron_metro.config.objectives import OBJECTIVES, check_switch
from megatron_metro.config.schema import CheckpointConfig, ParallelConfig, RunConfig, TrainingConfig

# What only a run that goes on can heed.
_OF_RESUMED = (
    "use_checkpoint_opt_param_scheduler",
    *(f.name for f in fields(CheckpointConfig) if "override" in f.name),
)


def resolve(config: RunConfig, world_size: int) -> RunConfig:
    """The same run with everything filled in that follows from other settings; resolving twice changes nothing.

    Filled in: global_batch_size, decoder_seq_length, tokenizer_type and, where the run's length is known,
    lr_decay_iters.
    """
    check_values(config)
    _check_processes(config.parallel, world_size)
    data, training, optimizer, tokenizer = config.data, config.training, config.optimizer, config.tokenizer
    if data.decoder_seq_length is None:
        data = replace(data, decoder_seq_length=derive_decoder_length(config))
    if training.global_batch_size is None:
        ranks = data_parallel_size(config.parallel, world_size)
        training = replace(training, global_batch_size=training.micro_batch_size * ranks)
    config = replace(config, data=data, training=training)
    _check_batches(config, world_size)
    _check_run_length(training)
    if optimizer.lr_decay_iters is None:
        optimizer = replace(optimizer, lr_decay_iters=count_steps(training))
    if tokenizer.tokenizer_type is None and (tokenizer.tokenizer_model or "").endswith(".model"):
        tokenizer = replace(tokenizer, tokenizer_type="SentencePieceTokenizer")
    return replace(config, optimizer=optimizer, tokenizer=tokenizer)


def validate(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError, one line, unless `world_size` processes can start this run."""
    config = resolve(config, world_size)
    check_widths(config.model, config.parallel)
    check_architecture(config.model)
    check_lengths(config)
    check_objective(config)
    check_heads(config)
    _check_pipeline(config, world_size)
    _check_overlap(config.parallel)
    _check_precision(config)
    _check_optimizer(config)
    _check_data(config)
    _check_checkpoints(config)


def require_training_inputs(config: RunConfig) -> None:
    """Raise ConfigError unless a resolved run says how long, on what data and with which tokenizer to train."""
    require(
        count_steps(config.training) is not None,
        "--train-iters: the run has no length; give --train-iters or --train-samples",
    )
    require(
        bool(config.data.data_path or config.data.train_data_path),
        "--data-path: there is no data; give a prefix, or JSON lines under --objective text-to-text",
    )
    tokenizer = config.tokenizer
    require(
        tokenizer.tokenizer_type == "NullTokenizer" or tokenizer.tokenizer_model is not None,
        "--tokenizer-model: there is no tokenizer; give a SentencePiece model, the one the data was made with",
    )
    require(
        tokenizer.tokenizer_type is not None,
        f"--tokenizer-model {tokenizer.tokenizer_model} does not end in .model; name its kind with --tokenizer-type",
    )
    require(
        tokenizer.tokenizer_type != "NullTokenizer" or config.model.vocab_size is not None,
        "--tokenizer-type NullTokenizer does not know the vocabulary; give --vocab-size",
    )
    check_switch(config)


def require_fine_tuning(config: RunConfig) -> None:
    """Raise ConfigError unless a run trains on sources and targets."""
    objective = config.objective.objective
    require(
        OBJECTIVES[objective].reads_pairs,
        f"--objective {objective} is pretraining; start it with tools/pretrain.py, or drop it for text-to-text",
    )


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Copies of the model among `world_size` processes."""
    return world_size // replica_size(parallel)


def replica_size(parallel: ParallelConfig) -> int:
    """Processes that hold one copy of the model."""
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size


def _check_processes(parallel: ParallelConfig, world_size: int) -> None:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    require(
        world_size > 0 and world_size % (tp * pp) == 0,
        f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp} needs a multiple of {tp * pp} "
        f"processes, found {world_size}; start {nearest_multiples(max(world_size, 0), tp * pp)} (torchrun "
        "--nproc-per-node) or change the sizes",
    )


def _check_batches(config: RunConfig, world_size: int) -> None:
    training = config.training
    full = training.global_batch_size
    assert full is not None
    ranks = data_parallel_size(config.parallel, world_size)
    share = training.micro_batch_size * ranks
    unit = f"--micro-batch-size {training.micro_batch_size} x {ranks} data-parallel ranks = {share}"
    require(
        full % share == 0,
        f"--global-batch-size {full} is not a multiple of {unit}; give {nearest_multiples(full, share)}",
    )
    if not training.rampup_batch_size:
        return
    start, increment, _ = training.rampup_batch_size
    ramp = "--rampup-batch-size " + " ".join(map(str, training.rampup_batch_size))
    require(
        start < full and (full - start) % increment == 0,
        f"{ramp}: steps of {increment} from {start} do not reach --global-batch-size {full}; "
        f"give a start below {full} and an increment that divides the difference",
    )
    for size in (start, increment):
        require(
            size % share == 0,
            f"{ramp}: {size} is not a multiple of {unit}; give {nearest_multiples(size, share)}",
        )


def _check_run_length(training: TrainingConfig) -> None:
    require(
        training.train_iters is None or training.train_samples is None,
        f"--train-iters {training.train_iters} and --train-samples {training.train_samples} both give the length; give "
        "one, and none for the other",
    )
    require(
        count_steps(training) != 0,
        f"--train-samples {training.train_samples} is less than one batch; give at least "
        f"{list_batch_sizes(training)[0]}",
    )


def _check_pipeline(config: RunConfig, world_size: int) -> None:
    parallel, training = config.parallel, config.training
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    sizes = f"--pipeline-model-parallel-size {pp} x --num-virtual-stages-per-pipeline-rank {vpp}"
    num_units = len(build_chain(config.model))
    most = f"{num_units // pp} virtual stages" if num_units >= pp else f"{num_units} stages"
    require(
        pp * vpp <= num_units,
        f"{sizes} cuts the model into {pp * vpp} pieces but it has only {num_units} units (embeddings, layers, heads); "
        f"give at most {most}",
    )
    if vpp == 1:
        return
    require(pp > 1, f"{sizes}: interleaving needs at least 2 stages; give 1 virtual stage or 2 stages")
    require(
        pp > 2 or parallel.overlap_p2p_communication,
        f"{sizes} with --no-overlap-p2p-communication mixes the messages of the two directions; drop "
        "--no-overlap-p2p-communication, or give 3 stages or 1 virtual stage",
    )
    share = training.micro_batch_size * data_parallel_size(parallel, world_size)
    for size in list_batch_sizes(training):
        num_microbatches = size // share
        require(
            num_microbatches % pp == 0,
            f"{sizes} needs the microbatches of a step in multiples of {pp}, found {num_microbatches} at global batch "
            f"size {size}; give --global-batch-size and --rampup-batch-size in multiples of {share * pp}",
        )


def _check_overlap(parallel: ParallelConfig) -> None:
    if not parallel.overlap_param_gather:
        return
    missing = [
        flag
        for flag, is_given in (
            ("--use-distributed-optimizer", parallel.use_distributed_optimizer),
            ("--overlap-grad-reduce", parallel.overlap_grad_reduce),
        )
        if not is_given
    ]
    require(
        not missing, f"--overlap-param-gather needs {' and '.join(missing)}, not found; give it, or drop the overlap"
    )


def _check_precision(config: RunConfig) -> None:
    optimizer = config.optimizer
    require(not (optimizer.bf16 and optimizer.fp16), "--bf16 and --fp16 are both given; give one of them")
    require(
        optimizer.fp16 or optimizer.loss_scale is None,
        f"--loss-scale {optimizer.loss_scale} scales FP16 losses, found no --fp16; drop it or give --fp16",
    )
    require(
        optimizer.initial_loss_scale >= optimizer.min_loss_scale,
        f"--initial-loss-scale {optimizer.initial_loss_scale:g} is below --min-loss-scale "
        f"{optimizer.min_loss_scale:g}; give at least {optimizer.min_loss_scale:g}",
    )
    require(
        not (config.training.device == "cpu" and config.parallel.distributed_backend == "nccl"),
        "--distributed-backend nccl has no messages between CPUs, found --device cpu; give --distributed-backend gloo",
    )


def _check_optimizer(config: RunConfig) -> None:
    optimizer = config.optimizer
    require(
        optimizer.optimizer != "adafactor" or not config.parallel.use_distributed_optimizer,
        "--use-distributed-optimizer cuts parameters anywhere, found --optimizer adafactor, which needs whole rows and "
        "columns and shards its state by whole parameters anyway; drop --use-distributed-optimizer",
    )
    decay, warmup = optimizer.lr_decay_iters, optimizer.lr_warmup_iters
    require(
        decay is None or warmup < decay,
        f"--lr-warmup-iters {warmup} does not end before --lr-decay-iters {decay} (train-iters when not given); give "
        f"--lr-warmup-iters {(decay or 0) // 10} or a longer run",
    )
    require(
        optimizer.min_lr <= optimizer.lr,
        f"--min-lr {optimizer.min_lr:g} is above --lr {optimizer.lr:g}; give at most {optimizer.lr:g}",
    )


def _check_data(config: RunConfig) -> None:
    data = config.data
    per_split = "--train-data-path" if data.train_data_path else "--valid-data-path" if data.valid_data_path else ""
    require(
        not (data.data_path and per_split),
        f"--data-path and {per_split} both name the data; give --data-path with --split, or one path per split",
    )
    require(
        per_split != "--valid-data-path",
        "--valid-data-path is given without --train-data-path; give both, or --data-path",
    )
    for flag, values in (
        ("--data-path", data.data_path),
        ("--train-data-path", data.train_data_path),
        ("--valid-data-path", data.valid_data_path),
    ):
        parse_blend(values, flag)
    _, valid_share, _ = parse_split(data.split)
    has_validation = bool(data.valid_data_path) if per_split else valid_share > 0 or not data.data_path
    require(
        has_validation or config.training.eval_iters == 0,
        f"--eval-iters {config.training.eval_iters} validates, but "
        + (
            f"--split {data.split} leaves validation no documents"
            if data.data_path
            else "there is no --valid-data-path"
        )
        + "; give it data, or --eval-iters 0",
    )


def _check_checkpoints(config: RunConfig) -> None:
    checkpoint = config.checkpoint
    load = checkpoint.load or checkpoint.pretrained_checkpoint
    needs = (
        ("--save-interval", checkpoint.save_interval is not None, "--save", checkpoint.save),
        ("--no-save-optim", checkpoint.no_save_optim, "--save", checkpoint.save),
        ("--async-save", checkpoint.async_save, "--save", checkpoint.save),
        ("--keep-last", checkpoint.keep_last is not None, "--save", checkpoint.save),
        ("--save-retain-interval", checkpoint.save_retain_interval is not None, "--save", checkpoint.save),
        ("--ckpt-step", checkpoint.ckpt_step is not None, "--load", checkpoint.load),
        ("--finetune", checkpoint.finetune, "--load", checkpoint.load),
        ("--no-load-optim", checkpoint.no_load_optim, "--load", checkpoint.load),
        ("--no-load-rng", checkpoint.no_load_rng, "--load", checkpoint.load),
        ("--use-checkpoint-args", checkpoint.use_checkpoint_args, "--load", load),
        *((f"--{name.replace('_', '-')}", getattr(checkpoint, name), "--load", load) for name in _OF_RESUMED),
        ("--exit-on-missing-checkpoint", checkpoint.exit_on_missing_checkpoint, "--load", load),
        ("--skip-damaged-checkpoints", checkpoint.skip_damaged_checkpoints, "--load", checkpoint.load),
    )
    for flag, is_given, needed, folder in needs:
        require(
            not is_given or folder is not None, f"{flag} needs {needed}, not found; give {needed} FOLDER or drop {flag}"
        )
    interval, retained = checkpoint.save_interval, checkpoint.save_retain_interval
    if interval is not None and retained is not None:
        require(
            retained % interval == 0,
            f"--save-retain-interval {retained} is not a multiple of --save-interval {interval}, so some of its steps "
            f"would never be saved; give {nearest_multiples(retained, interval)}",
        )
    require(
        not (checkpoint.override_opt_param_scheduler and checkpoint.use_checkpoint_opt_param_scheduler),
        "--override-opt-param-scheduler follows the flags of this run, --use-checkpoint-opt-param-scheduler those of "
        "the checkpoint, found both; give one of them",
    )
