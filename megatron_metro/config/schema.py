"""The sections of a run's configuration: frozen dataclasses, one per concern.

Every field is one command-line flag: `hidden_size` is `--hidden-size`. Names and meanings are Megatron's wherever
Megatron has the flag. Checks across fields live in `validation.py`, defaults of named runs in `presets.py`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that is also a command-line flag.

    `metadata` may hold `alias` (another spelling of the flag), `nargs`, `negative` (a spelling that switches a boolean
    off, beside the generated `--no-x`) and the bounds of a number: `minimum` and `maximum` belong to the legal values,
    `above` and `below` do not. None is always legal where the type allows it.
    """
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Architecture of the generator and the main model (METRO: reference implementation; T5: v1.0 and v1.1)."""

    encoder_num_layers: int = option(12, "encoder depth; --num-layers sets both depths", minimum=1, maximum=10_000)
    decoder_num_layers: int = option(
        12, "decoder depth; 0 builds an encoder alone (electra)", minimum=0, maximum=10_000
    )
    generator_num_layers: int = option(
        4,
        "depth of the auxiliary generator; 0 builds the main model alone, which then reads the masked text itself",
        minimum=0,
        maximum=10_000,
    )
    hidden_size: int = option(768, "width of encoder and decoder", minimum=1, maximum=1_048_576)
    ffn_hidden_size: int = option(3072, "width of the feed-forward layers", minimum=1, maximum=1_048_576)
    num_attention_heads: int = option(12, "attention heads", minimum=1, maximum=65_536)
    kv_channels: int | None = option(
        None, "width of one head; hidden-size / num-attention-heads when not given", minimum=1
    )
    generator_hidden_size: int | None = option(
        None, "width of the generator; embeddings are projected to another one", minimum=1, maximum=1_048_576
    )
    generator_ffn_hidden_size: int | None = option(
        None,
        "width of the generator's feed-forward layers; ffn-hidden-size when not given",
        minimum=1,
        maximum=1_048_576,
    )
    generator_num_attention_heads: int | None = option(
        None, "the generator's attention heads; num-attention-heads when not given", minimum=1, maximum=65_536
    )
    max_position_embeddings: int = option(1024, "longest sequence the learned positions can address", minimum=1)
    position_embedding_type: Literal["learned_absolute", "none"] = option(
        "learned_absolute", "absolute positions (METRO) or none (T5 has only the relative bias)"
    )
    relative_attention: Literal["per_layer", "per_stack", "none"] = option(
        "per_layer", "relative bias tables: one per layer (METRO), one per stack (T5) or none"
    )
    relative_attention_decoder: bool = option(False, "give the decoder's self-attention a relative bias too (T5)")
    relative_attention_bucket: Literal["metro", "t5"] = option("metro", "bucket function of the relative bias")
    relative_attention_num_buckets: int = option(32, "buckets of a relative bias table", minimum=4)
    relative_attention_max_distance: int = option(
        128, "distance from which all positions share the last bucket", minimum=3
    )
    norm_placement: Literal["post", "pre"] = option(
        "post",
        "post: after each residual sum, a norm on the embeddings, none at the end (METRO); "
        "pre: before each sublayer, none on the embeddings, one at the end of each stack (T5)",
    )
    normalization: Literal["LayerNorm", "RMSNorm"] = option("LayerNorm", "kind of norm")
    norm_epsilon: float = option(1e-5, "epsilon of the norms", above=0.0)
    activation: Literal["relu", "gelu", "gated-gelu"] = option("relu", "activation of the feed-forward layers")
    add_bias_linear: bool = option(True, "biases in the linear layers", negative="--disable-bias-linear")
    softmax_scale: float | None = option(
        None, "scale of the attention scores; kv-channels^-0.5 when not given, 1.0 in T5", above=0.0
    )
    untie_embeddings_and_output_weights: bool = option(False, "give the LM head its own matrix")
    scale_lm_output: bool = option(False, "multiply states by hidden-size^-0.5 before a tied head (T5)")
    generator_embedding_sharing: Literal["token", "token_pos_norm"] = option(
        "token", "what generator and main model share: token matrix, or positions and embedding norm too (base++)"
    )
    mlm_head: Literal["roberta", "linear"] = option(
        "roberta", "generator head: dense, ReLU, norm and vocabulary matrix, or the matrix alone"
    )
    untie_mlm_head: bool = option(False, "give the generator's head its own vocabulary matrix (SPACTOR)")
    rtd_head: Literal["simple", "roberta", "gelu", "none"] = option(
        "roberta",
        "replaced-token-detection head of the encoder: one linear layer; dense, ReLU and norm before it; dense and "
        "GELU before it (SPACTOR)",
    )
    rtd_head_hidden_size: int | None = option(
        None, "inner width of --rtd-head gelu; ffn-hidden-size when not given", minimum=1, maximum=1_048_576
    )
    hidden_dropout: float = option(
        0.1, "dropout after embeddings and sublayers of the main model", minimum=0.0, below=1.0
    )
    attention_dropout: float = option(
        0.1, "dropout on attention probabilities of the main model", minimum=0.0, below=1.0
    )
    dropout_places: Literal["metro", "t5"] = option(
        "metro",
        "metro: hidden-dropout after embeddings and sublayers; t5: also on the activations of feed-forward layers and "
        "after the final norm of each stack",
    )
    generator_dropout: float = option(
        0.0, "both dropouts inside the generator (0 in every METRO recipe)", minimum=0.0, below=1.0
    )
    init_method: Literal["metro", "normal"] = option(
        "metro", "metro: the reference's initialisation; normal: N(0, init-method-std) for every matrix"
    )
    init_method_std: float = option(
        0.02, "standard deviation of `--init-method normal` and of METRO's generator", above=0.0
    )
    vocab_size: int | None = option(
        None,
        "rows of the token matrix, sentinels included; the tokenizer's when not given",
        minimum=1,
        maximum=16_777_216,  # what three base-256 digits of a pipeline message address
    )
    make_vocab_size_divisible_by: int = option(
        128, "pad the token matrix so that each rank holds a multiple of this", minimum=128
    )
    rtd_position: Literal["encoder", "decoder"] = option(
        "encoder",
        "whose output the RTD head reads: the encoder's, or the decoder's at every position (METRO's ablation)",
    )
    lm_head: Literal["linear", "linear-bias", "roberta"] = option(
        "linear", "LM head: the vocabulary matrix; a bias after it (Megatron-LM's T5); dense, ReLU and norm before too"
    )
    copy_mechanism: bool = option(
        False, "let the LM head copy the corrupted input's token where the RTD head calls it original (COCO-LM)"
    )
    encoder_lm_head: bool = option(
        False, "give an encoder without a decoder an LM head, which corrects what the generator replaced (COCO-LM)"
    )

    @property
    def has_generator(self) -> bool:
        return self.generator_num_layers > 0

    @property
    def has_rtd_head(self) -> bool:
        """Replaced tokens exist only where a generator fills them in."""
        return self.has_generator and self.rtd_head != "none"

    @property
    def has_encoder_rtd_head(self) -> bool:
        return self.has_rtd_head and self.rtd_position == "encoder"

    @property
    def has_decoder_rtd_head(self) -> bool:
        return self.has_rtd_head and self.rtd_position == "decoder"

    @property
    def has_decoder(self) -> bool:
        return self.decoder_num_layers > 0

    @property
    def has_lm_head(self) -> bool:
        """Whether anything is written: by the decoder, or by an encoder alone."""
        return self.has_decoder or self.encoder_lm_head

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.kv_channels if self.kv_channels is not None else self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What the model is trained to do, and how the terms of its loss are weighed."""

    objective: Literal[
        "metro",
        "electra",
        "spactor",
        "t5-span",
        "t5-metro",
        "t5-iid",
        "prefix-lm",
        "bert-style",
        "mass-style",
        "deshuffle",
        "drop-tokens",
        "text-to-text",
    ] = option("metro", "what is trained; text-to-text writes targets after sources, all others make both from text")
    mask_prob: float = option(
        0.15,
        "share of tokens masked (metro, electra) or corrupted (all but prefix-lm, deshuffle, text-to-text)",
        above=0.0,
        below=1.0,
    )
    spactor_mask_prob: float = option(
        0.15,
        "share of what span corruption leaves that is masked for the generator (spactor; 0.2 in its Large)",
        above=0.0,
        below=1.0,
    )
    mask_spans: bool = option(
        False, "mask contiguous spans of --mean-noise-span-length instead of single tokens, as many (metro, electra)"
    )
    lm_targets: Literal["masked", "all", "masked-only"] = option(
        "masked",
        "masked: the LM loss is on masked tokens; all: on every token of the whole text (metro, t5-metro, electra); "
        "masked-only: the decoder writes nothing but the masked tokens (metro)",
    )
    mask_token_prob: float = option(
        0.8, "share of masked positions shown to the generator as the mask token", minimum=0.0, maximum=1.0
    )
    mask_random_prob: float = option(
        0.1,
        "share of masked positions shown as a random token (metro, electra; bert-style, which masks all others)",
        minimum=0.0,
        maximum=1.0,
    )
    mask_special_tokens: bool = option(True, "let <s> and </s> be masked as the reference does")
    probabilistic_rounding: bool = option(
        True, "round the number of masked tokens at random so that its mean is exact; down when off"
    )
    mean_noise_span_length: float = option(
        3.0, "mean length of a corrupted span (t5-span, t5-metro, spactor; --mask-spans)", minimum=1.0
    )
    mlm_loss_weight: float = option(1.0, "weight of the generator's masked-LM loss", minimum=0.0)
    rtd_loss_weight: float = option(50.0, "weight of the replaced-token-detection loss", minimum=0.0)
    lm_loss_weight: float = option(1.0, "weight of the decoder's corrective LM loss", minimum=0.0)
    weighted_lm_loss: bool = option(False, "multiply each token's LM loss by the predicted replaced-probability")
    eval_all_positions: bool = option(False, "unreplaced accuracy over all positions in validation, as the reference")
    spactor_normalisation: Literal["sum", "mean"] = option(
        "sum",
        "spactor's losses: sums over tokens per sequence, as in the paper, or means over tokens, as in all others",
    )
    mlm_loss_weight_schedule: str | None = option(
        None, "--mlm-loss-weight along the run: STEP:VALUE,STEP:VALUE,..., linear between the points"
    )
    rtd_loss_weight_schedule: str | None = option(
        None, "--rtd-loss-weight along the run, as 0:0,10000:50 for a rise over 10,000 steps"
    )
    lm_loss_weight_schedule: str | None = option(None, "--lm-loss-weight along the run, likewise")
    mask_prob_schedule: str | None = option(
        None,
        "--mask-prob along the run, likewise, where it does not decide how much text a block holds (metro, electra, "
        "t5-metro, t5-iid, bert-style, mass-style); validation masks at --mask-prob",
    )
    spactor_mask_prob_schedule: str | None = option(None, "--spactor-mask-prob along the run, likewise")
    spactor_tau: int | None = option(
        120_000,
        "step at which SPACTOR drops its generator and goes on with span corruption alone; none: never",
        minimum=1,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the tokens come from and how they become blocks."""

    data_path: tuple[str, ...] = option(
        (), "prefixes of .bin/.idx files (text-to-text: JSON lines), or: weight prefix weight prefix ...", nargs="+"
    )
    train_data_path: tuple[str, ...] = option((), "as --data-path, for training only", nargs="+")
    valid_data_path: tuple[str, ...] = option((), "as --data-path, for validation only", nargs="+")
    split: str = option("969,30,1", "proportions of training, validation and test documents")
    data_cache_path: str | None = option(None, "folder of the sample indices; <save>/cache when not given")
    encoder_seq_length: int = option(512, "tokens the encoder reads", alias="--seq-length", minimum=3)
    decoder_seq_length: int | None = option(
        None,
        "tokens the decoder writes; follows from the objective, under text-to-text encoder-seq-length when not given",
        minimum=0,
    )
    block_mode: Literal["full", "complete_doc"] = option(
        "full", "full: every block holds seq-length tokens; complete_doc: whole lines of one document, padded"
    )
    pack_examples: bool = option(
        False, "text-to-text: several examples in a row, none of which sees another; one a row when off"
    )
    truncate_source: bool = option(False, "text-to-text: cut sources that are too long, rather than to refuse them")
    truncate_target: bool = option(False, "text-to-text: cut targets that are too long, rather than to refuse them")
    num_workers: int | None = option(
        None,
        "worker processes that prepare batches, 0 for none; 2 on GPUs and 0 on CPUs, whose cores they would take, when "
        "not given",
        minimum=0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """Text to ids."""

    tokenizer_type: Literal["SentencePieceTokenizer", "NullTokenizer"] | None = option(
        None, "kind of tokenizer; SentencePieceTokenizer when --tokenizer-model ends in .model"
    )
    tokenizer_model: str | None = option(None, "SentencePiece model file")
    vocab_extra_ids: int = option(512, "sentinels appended to the vocabulary", minimum=1)
    pre_tokenizer: Literal["none", "metro", "metro-lower"] = option(
        "none", "before SentencePiece: nothing; METRO's splitting at punctuation, also to lower case as released"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the model and the batch are spread over processes."""

    tensor_model_parallel_size: int = option(
        1, "processes that share each layer", alias="--model-parallel-size", minimum=1
    )
    pipeline_model_parallel_size: int = option(1, "stages the chain of layers is cut into", minimum=1)
    num_virtual_stages_per_pipeline_rank: int = option(
        1, "pieces of the chain per stage (interleaved schedule)", minimum=1
    )
    pipeline_model_parallel_layout: str | None = option(
        None, "pieces by hand, letters per unit and | between pieces; balanced by cost when not given"
    )
    sequence_parallel: bool = option(False, "shard activations between tensor-parallel regions along the sequence")
    use_distributed_optimizer: bool = option(False, "shard optimizer state over data-parallel ranks")
    overlap_grad_reduce: bool = option(False, "reduce gradients while the backward pass runs")
    overlap_param_gather: bool = option(False, "gather updated parameters while the forward pass runs")
    overlap_p2p_communication: bool = option(True, "overlap pipeline messages with computation (interleaved schedule)")
    deallocate_pipeline_outputs: bool = option(True, "free a stage's output once sent")
    recompute_granularity: Literal["selective", "full"] | None = option(
        None, "selective: recompute attention scores in backward; full: recompute whole layers"
    )
    check_weight_sharing_interval: int = option(
        0, "steps between checks that shared weights are bit-equal; 0 is never", minimum=0
    )
    distributed_backend: Literal["nccl", "gloo"] | None = option(None, "nccl on CUDA and gloo on CPU when not given")
    distributed_timeout_minutes: float = option(10.0, "minutes after which a silent peer ends the job", above=0.0)
    distributed_timeout_seconds_after_init: float | None = option(
        None, "the same from the second step on, in seconds; --distributed-timeout-minutes when not given", minimum=5.0
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """The optimizer, its learning rate schedule and numeric precision. Weight decay is applied to all parameters."""

    optimizer: Literal["adam", "adafactor"] = option("adam", "AdamW, or Adafactor as T5 and SPACTOR were trained with")
    lr: float = option(4e-4, "peak learning rate", above=0.0)
    min_lr: float = option(0.0, "lowest learning rate of the decay", minimum=0.0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = option(
        "linear", "shape of the decay"
    )
    lr_decay_iters: int | None = option(None, "steps of the decay; train-iters when not given", minimum=1)
    lr_warmup_iters: int = option(10_000, "steps of the warm-up", minimum=0)
    lr_warmup_style: Literal["linear", "constant"] = option("linear", "rise from 0, or hold the value at its end")
    weight_decay: float = option(0.01, "decoupled weight decay", minimum=0.0)
    adam_beta1: float = option(0.9, "decay of the first moment", minimum=0.0, below=1.0)
    adam_beta2: float = option(0.98, "decay of the second moment", minimum=0.0, below=1.0)
    adam_eps: float = option(1e-6, "epsilon of Adam", above=0.0)
    adafactor_decay_rate: float = option(
        0.8, "Adafactor's second moment decays by 1 - step^-rate", minimum=0.0, maximum=1.0
    )
    adafactor_relative_step: bool = option(
        True, "Adafactor's step is at most step^-1/2, as torch's; --lr alone decides when off (T5)"
    )
    adafactor_scale_parameter: bool = option(
        True, "multiply Adafactor's step by the root mean square of the matrix it moves"
    )
    adafactor_eps1: float = option(
        1e-15, "Adafactor's smallest root of a second moment: that of T5's 1e-30", minimum=1e-18, maximum=1.0
    )
    adafactor_eps2: float = option(1e-3, "least root mean square of --adafactor-scale-parameter", above=0.0)
    adafactor_clip_threshold: float = option(
        1.0, "largest root mean square of one matrix's update in Adafactor", minimum=1.0
    )
    clip_grad: float = option(
        0.0, "largest global gradient norm; 0 switches clipping off (the norm is still reported)", minimum=0.0
    )
    bf16: bool = option(False, "BF16 weights and activations with FP32 main weights")
    fp16: bool = option(False, "FP16 weights and activations with FP32 main weights and loss scaling")
    loss_scale: float | None = option(None, "constant FP16 loss scale; dynamic when not given", above=0.0)
    initial_loss_scale: float = option(2.0**16, "first value of the dynamic FP16 loss scale", above=0.0)
    min_loss_scale: float = option(1.0, "lowest value of the dynamic FP16 loss scale", above=0.0)
    loss_scale_window: int = option(1000, "clean steps after which the dynamic FP16 loss scale doubles", minimum=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Length of the run and size of its batches."""

    micro_batch_size: int = option(
        8, "sequences per forward pass and data-parallel rank", alias="--batch-size", minimum=1
    )
    global_batch_size: int | None = option(
        None, "sequences per step; micro-batch-size x data-parallel size by default", minimum=1, maximum=1_048_576
    )
    rampup_batch_size: tuple[int, ...] = option(
        (), "start size, increment and samples over which the global batch grows to its full size", nargs=3, minimum=1
    )
    train_iters: int | None = option(None, "optimizer steps of the run", minimum=1)
    train_samples: int | None = option(None, "length of the run in sequences, instead of --train-iters", minimum=1)
    eval_interval: int = option(1000, "steps between validations; 0 validates only at the end", minimum=0)
    eval_iters: int = option(10, "global batches per validation; 0 never validates", minimum=0)
    exit_interval: int | None = option(None, "stop (and save) after a step divisible by this", minimum=1)
    exit_duration_in_mins: float | None = option(
        None, "stop (and save) after the step during which the command has run for so many minutes", above=0.0
    )
    exit_signal_handler: bool = option(
        True,
        "SIGTERM, SIGINT and SIGUSR1 save and stop after the step in progress, exit code 75; a second one ends at once",
    )
    max_nonfinite_steps: int = option(
        10,
        "steps in a row with losses or gradients that are not finite, which change no weight, after which the run "
        "stops; 1 stops at the first. FP16 steps count once the loss scale can fall no further",
        minimum=1,
    )
    loss_spike_deviations: float = option(
        10.0, "standard deviations (robust, over 128 steps) above the usual total loss that make a spike", above=0.0
    )
    loss_spike_policy: Literal["report", "skip"] = option(
        "report", "a step whose loss is a spike is reported, or also changes no weight"
    )
    seed: int = option(1234, "seed of weights, masks, order and sampling", minimum=0)
    device: Literal["auto", "cuda", "cpu"] = option("auto", "cuda with NCCL or cpu with gloo; cuda where there is one")
    deterministic_mode: bool = option(False, "refuse kernels whose result depends on timing")
    cpu_matmul_precision: Literal["highest", "high", "medium"] = option(
        "highest", "torch.set_float32_matmul_precision of the run"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Where a run is saved and what it starts from."""

    save: str | None = option(None, "folder of checkpoints, metrics and logs")
    load: str | None = option(None, "folder to resume from")
    pretrained_checkpoint: str | None = option(
        None,
        "folder of a run, or one step of it, whose weights a new run starts from while --load holds no checkpoint yet",
    )
    save_interval: int | None = option(None, "steps between checkpoints; only at the end when not given", minimum=1)
    save_retain_interval: int | None = option(
        None, "delete the former checkpoints but those of steps divisible by this", minimum=1
    )
    keep_last: int | None = option(None, "delete all but this many newest checkpoints", minimum=1)
    async_save: bool = option(False, "write checkpoints in the background, from a copy in host memory")
    async_save_timeout: float = option(600.0, "seconds that a save in the background may take", above=0.0)
    ckpt_step: int | None = option(None, "step to load instead of the newest", minimum=0)
    skip_damaged_checkpoints: bool = option(
        False, "load the newest whole step; damaged newer ones are renamed where --save is --load"
    )
    finetune: bool = option(False, "load weights only and start at step 0")
    no_save_optim: bool = option(False, "leave the optimizer state out of checkpoints")
    no_load_optim: bool = option(False, "do not load the optimizer state")
    no_load_rng: bool = option(False, "do not load the random states of dropout; it goes on from --seed")
    use_checkpoint_args: bool = option(
        False,
        "take architecture, tokenizer, lengths from the checkpoint; only dropout and lengths of a new run may differ",
    )
    use_checkpoint_opt_param_scheduler: bool = option(
        False, "take learning rates, their schedule and weight decay from the checkpoint, whatever the flags say"
    )
    override_opt_param_scheduler: bool = option(
        False, "go on from --load with another optimizer setting: rates, decay, warm-up, betas, clipping"
    )
    override_data: bool = option(
        False, "go on from --load with other text, blend, --split, blocks or --seed, after as many samples"
    )
    override_tokenizer: bool = option(False, "go on from --load with another tokenizer of as many ids")
    override_batch_size: bool = option(
        False, "go on from --load with another --global-batch-size or --rampup-batch-size"
    )
    override_objective: bool = option(
        False, "go on from --load with another objective, masking rate or loss weight, or other target lengths"
    )
    override_model: bool = option(
        False, "go on from --load with a model that computes otherwise on the same weights: dropout, precision, scales"
    )
    exit_on_missing_checkpoint: bool = option(False, "stop when --load holds no checkpoint")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """What a run tells while it runs."""

    log_interval: int = option(10, "steps between log lines", minimum=1)
    tensorboard_dir: str | None = option(None, "folder of TensorBoard events")
    log_throughput: bool = option(True, "TFLOP/s, MFU and time left in the log line")
    log_params_norm: bool = option(False, "global norm of the parameters in the log line")
    peak_tflops: float | None = option(None, "peak of one device for MFU; known for A100, H100 and H200", above=0.0)
    progress_bar: bool = option(True, "a progress bar when standard error is a terminal")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run: one value per concern."""

    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
