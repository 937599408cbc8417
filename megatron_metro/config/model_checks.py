"""Checks of what is trained: the model, its lengths and its objective, also against the tensor-parallel size."""

from megatron_metro.config.chain import Network
from megatron_metro.config.curriculum import largest_values
from megatron_metro.config.legal import nearest_divisors, nearest_multiples, require
from megatron_metro.config.lengths import static_lengths
from megatron_metro.config.network_sizes import network_sizes
from megatron_metro.config.objectives import check_data_of_objective, has_decoder
from megatron_metro.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_metro.config.terms import target_kind

VOCAB_CHUNK = 128  # columns of the fixed grid on which the sampler sums probabilities


def derive_decoder_length(config: RunConfig) -> int:
    """Tokens the decoder writes under the run's objective."""
    return static_lengths(config).decoder


def check_widths(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Widths, heads and vocabulary divide as they must."""
    tp = parallel.tensor_model_parallel_size
    _check_network_widths(model, "encoder", tp)
    if model.has_generator:
        _check_network_widths(model, "generator", tp)
    divisor = model.make_vocab_size_divisible_by
    require(
        divisor % VOCAB_CHUNK == 0,
        f"--make-vocab-size-divisible-by {divisor} is not a multiple of {VOCAB_CHUNK}, the sampler's chunk; give "
        f"{nearest_multiples(divisor, VOCAB_CHUNK)}",
    )


def _check_network_widths(model: ModelConfig, network: Network, tp: int) -> None:
    """Encoder and decoder have the same widths; the generator's flags are named only where they are given."""
    sizes = network_sizes(model, network)

    def name(field: str) -> str:
        own = f"generator_{field}"
        is_own = network == "generator" and getattr(model, own) is not None
        return "--" + (own if is_own else field).replace("_", "-")

    hidden, ffn, heads = sizes.hidden_size, sizes.ffn_hidden_size, sizes.num_attention_heads
    hidden_flag, ffn_flag, heads_flag = map(name, ("hidden_size", "ffn_hidden_size", "num_attention_heads"))
    require(
        model.kv_channels is not None or hidden % heads == 0,
        f"{hidden_flag} {hidden} is not a multiple of {heads_flag} {heads}; give "
        f"{nearest_divisors(hidden, heads)} heads, or --kv-channels",
    )
    require(
        heads % tp == 0,
        f"{heads_flag} {heads} is not a multiple of --tensor-model-parallel-size {tp}; give "
        f"{nearest_multiples(heads, tp)} heads, or size {nearest_divisors(heads, tp)}",
    )
    require(
        ffn % tp == 0,
        f"{ffn_flag} {ffn} is not a multiple of --tensor-model-parallel-size {tp}; give {nearest_multiples(ffn, tp)}",
    )


def check_architecture(model: ModelConfig) -> None:
    """Parts of the model do not contradict each other."""
    buckets, distance = model.relative_attention_num_buckets, model.relative_attention_max_distance
    if model.relative_attention != "none":
        require(
            buckets % 4 == 0,
            f"--relative-attention-num-buckets {buckets} is not a multiple of 4; give {nearest_multiples(buckets, 4)}",
        )
        # half of the buckets (a quarter, where signs are told apart) count exact distances; the rest are logarithmic
        exact = buckets // 2 if model.relative_attention_decoder else buckets // 4
        require(
            distance > exact + 1,
            f"--relative-attention-max-distance {distance} leaves no logarithmic buckets among "
            f"--relative-attention-num-buckets {buckets}; give at least {exact + 2}",
        )
    require(
        not model.relative_attention_decoder or model.relative_attention != "none",
        "--relative-attention-decoder contradicts --relative-attention none; give --relative-attention per_stack",
    )
    require(
        not (model.scale_lm_output and model.untie_embeddings_and_output_weights),
        "--scale-lm-output belongs to a tied head, found --untie-embeddings-and-output-weights; drop one of them",
    )
    require(
        model.rtd_head_hidden_size is None or model.rtd_head == "gelu",
        f"--rtd-head-hidden-size {model.rtd_head_hidden_size} is the inner width of --rtd-head gelu, found --rtd-head "
        f"{model.rtd_head}; give --rtd-head gelu or drop the width",
    )
    shares_all = model.has_generator and model.generator_embedding_sharing == "token_pos_norm"
    require(
        not shares_all or (model.position_embedding_type != "none" and model.norm_placement == "post"),
        "--generator-embedding-sharing token_pos_norm needs learned positions and an embedding norm, found "
        f"--position-embedding-type {model.position_embedding_type} and --norm-placement {model.norm_placement}; "
        "give --generator-embedding-sharing token",
    )


def check_lengths(config: RunConfig) -> None:
    """Sequences fit the objective, the positions and the tensor-parallel ranks; decoder_seq_length is resolved."""
    data, model, parallel = config.data, config.model, config.parallel
    encoder, decoder, derived = data.encoder_seq_length, data.decoder_seq_length, derive_decoder_length(config)
    assert decoder is not None
    require(
        decoder == derived,
        f"--decoder-seq-length {decoder} does not follow from --encoder-seq-length {encoder} under --objective "
        f"{config.objective.objective}; give {derived} or leave it out",
    )
    tp = parallel.tensor_model_parallel_size
    require(
        not parallel.sequence_parallel or tp > 1,
        "--sequence-parallel needs --tensor-model-parallel-size above 1, found 1; drop it or give a size of 2",
    )
    limit = model.max_position_embeddings
    for flag, length in (("--encoder-seq-length", encoder), ("--decoder-seq-length", decoder)):
        require(
            model.position_embedding_type == "none" or length <= limit,
            f"{flag} {length} is longer than --max-position-embeddings {limit}; give {flag} {limit} at most, or "
            f"--max-position-embeddings {length}",
        )
        require(
            not parallel.sequence_parallel or length % tp == 0,
            f"{flag} {length} is not a multiple of --tensor-model-parallel-size {tp} under --sequence-parallel; give "
            f"a length of {nearest_multiples(length, tp)}, a size of {nearest_divisors(length, tp)}, or "
            "--no-sequence-parallel",
        )


def check_objective(config: RunConfig) -> None:
    """The objective has what it trains and the sentinels it writes."""
    objective, model, extra_ids = largest_values(config.objective), config.model, config.tokenizer.vocab_extra_ids
    require(
        model.vocab_size is None or model.vocab_size > extra_ids,
        f"--vocab-size {model.vocab_size} counts the sentinels too and must exceed --vocab-extra-ids {extra_ids}; give "
        "pieces + sentinels",
    )
    shown = objective.mask_token_prob + objective.mask_random_prob
    require(
        shown <= 1 + 1e-9,
        f"--mask-token-prob {objective.mask_token_prob} + --mask-random-prob {objective.mask_random_prob} is "
        f"{shown:g}; give shares that sum to 1 at most (the rest keeps its token)",
    )
    require(
        objective.mlm_loss_weight + objective.rtd_loss_weight + objective.lm_loss_weight > 0,
        "--mlm-loss-weight, --rtd-loss-weight and --lm-loss-weight are all 0; give one a positive weight",
    )
    require(
        not objective.weighted_lm_loss or model.has_rtd_head,
        "--weighted-lm-loss needs a replaced-token-detection head, found --rtd-head "
        f"{model.rtd_head} and --generator-num-layers {model.generator_num_layers}; drop it or give both",
    )
    for schedule, is_trained, missing in (
        ("mlm_loss_weight_schedule", model.has_generator, "a generator; raise --generator-num-layers"),
        ("rtd_loss_weight_schedule", model.has_rtd_head, "an RTD head; give --rtd-head and --generator-num-layers"),
    ):
        text = getattr(objective, schedule)
        require(
            text is None or is_trained,
            f"--{schedule.replace('_', '-')} {text} weighs a loss that needs {missing}, or drop the schedule",
        )
    require(
        objective.lm_loss_weight > 0 or model.has_generator,
        f"--lm-loss-weight 0 leaves --objective {objective.objective} without a generator nothing to train; give 1.0",
    )
    check_data_of_objective(config)


def check_heads(config: RunConfig) -> None:
    """Heads find what they read: the chain ends with one, and each has its network, its labels and its tokens."""
    model, objective = config.model, config.objective
    name, kind = f"--objective {objective.objective}", target_kind(objective)
    require(
        model.has_decoder == has_decoder(config),
        f"{name} {'needs a' if has_decoder(config) else 'has no'} decoder, found --decoder-num-layers "
        f"{model.decoder_num_layers}; give {'at least 1' if has_decoder(config) else '0'}",
    )
    require(
        model.has_lm_head or model.has_encoder_rtd_head,
        f"{name} trains nothing of the main model, found --rtd-head {model.rtd_head} on the {model.rtd_position} and "
        "no --encoder-lm-head; give one of the heads",
    )
    require(
        not (model.encoder_lm_head and model.has_decoder),
        "--encoder-lm-head is for an encoder alone, found --decoder-num-layers "
        f"{model.decoder_num_layers}; drop it, or give --objective electra",
    )
    for flag, is_given in (
        (f"--lm-head {model.lm_head}", model.lm_head != "linear"),
        ("--copy-mechanism", model.copy_mechanism),
    ):
        require(
            not is_given or model.has_lm_head,
            f"{flag} changes the LM head, which {name} has not; give --encoder-lm-head or drop {flag}",
        )
    require(
        not (model.lm_head != "linear" and model.scale_lm_output),
        f"--scale-lm-output is for --lm-head linear, found --lm-head {model.lm_head}; drop one of them",
    )
    require(
        model.rtd_position == "encoder" or (model.has_decoder and kind != "others" and not _writes_masked_only(config)),
        f"--rtd-position decoder judges a decoder that writes the whole text, found {name} and --lm-targets "
        f"{objective.lm_targets}; give --rtd-position encoder",
    )
    require(
        not model.copy_mechanism or (model.has_rtd_head and kind != "others"),
        "--copy-mechanism copies the token that stands in a target's place as the RTD head trusts it, found "
        f"{name}, --rtd-head {model.rtd_head} and --generator-num-layers {model.generator_num_layers}; drop it",
    )
    require(
        not model.copy_mechanism
        or model.has_decoder_rtd_head
        or (objective.lm_targets != "all" and not objective.eval_all_positions),
        "--copy-mechanism has the encoder's verdicts at masked tokens only, found --lm-targets "
        f"{objective.lm_targets} and eval-all-positions {objective.eval_all_positions}; give "
        + ("--rtd-position decoder" if model.has_decoder else "--lm-targets masked"),
    )
    require(
        not objective.eval_all_positions
        or (model.has_generator and model.has_decoder and kind == "fills" and not _writes_masked_only(config)),
        f"--eval-all-positions scores a decoder that writes a whole text which a generator has changed, found {name}, "
        f"--generator-num-layers {model.generator_num_layers} and --lm-targets {objective.lm_targets}; drop it",
    )


def _writes_masked_only(config: RunConfig) -> bool:
    return config.objective.lm_targets == "masked-only"
