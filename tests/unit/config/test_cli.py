"""Flags: what they set, which of flag, file and preset wins, what --help teaches, and what is refused."""

import dataclasses

import pytest

from megatron_metro.config.cli import Tool, format_config, parse_run, read_run
from megatron_metro.config.errors import ConfigError
from megatron_metro.config.fields import list_settings, read_value
from megatron_metro.config.presets import PRESETS, fine_tuning
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.validation import require_fine_tuning, resolve, validate


def test_no_flags_are_the_defaults():
    assert read_run([]) == RunConfig()


@pytest.mark.parametrize(
    ("words", "section", "name", "value"),
    [
        ("--hidden-size 64", "model", "hidden_size", 64),
        ("--hidden-size=64", "model", "hidden_size", 64),
        ("--lr 4e-4", "optimizer", "lr", 4e-4),
        ("--lr 1", "optimizer", "lr", 1.0),
        ("--bf16", "optimizer", "bf16", True),
        ("--disable-bias-linear", "model", "add_bias_linear", False),
        ("--no-add-bias-linear", "model", "add_bias_linear", False),
        ("--no-log-throughput", "logging", "log_throughput", False),
        ("--no-save-optim", "checkpoint", "no_save_optim", True),
        ("--save-optim", "checkpoint", "no_save_optim", False),
        ("--data-path 30 a 70 b", "data", "data_path", ("30", "a", "70", "b")),
        ("--rampup-batch-size 8 8 1000", "training", "rampup_batch_size", (8, 8, 1000)),
        ("--recompute-granularity full", "parallel", "recompute_granularity", "full"),
        ("--relative-attention none", "model", "relative_attention", "none"),
        ("--kv-channels 32", "model", "kv_channels", 32),
        ("--save ünïcode/päth", "checkpoint", "save", "ünïcode/päth"),
    ],
)
def test_a_flag_sets_its_field(words, section, name, value):
    found = getattr(getattr(read_run(words.split()), section), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("name", list_settings())
def test_every_setting_can_be_given_by_its_flag(name):
    setting = list_settings()[name]
    if setting.kind is bool:
        assert read_value(read_run([setting.flag]), setting) is True
        assert all(read_value(read_run([flag]), setting) is False for flag in setting.negatives)
        return
    lowest = max(setting.metadata.get("minimum", 0), setting.metadata.get("above", 0))
    value = (
        setting.choices[-1] if setting.choices else {int: lowest + 1, float: lowest + 0.5, str: "text"}[setting.kind]
    )
    values = (value,) * (setting.length or 1)
    for flag in setting.flags:
        found = read_value(read_run([flag, *map(str, values)]), setting)
        assert found == (values if setting.is_list else value)


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 5e-4\nmodel:\n  hidden_size: 128\n")
    run = read_run(["--preset", "metro-tiny", "--config", str(file), "--lr", "7e-4"])
    assert (run.optimizer.lr, run.model.hidden_size, run.model.ffn_hidden_size) == (7e-4, 128, 256)


def test_none_unsets_what_a_preset_set():
    run = read_run(["--preset", "metro-base", "--vocab-size", "none", "--train-iters", "none", "--no-bf16"])
    assert (run.model.vocab_size, run.training.train_iters) == (None, None)


def test_the_preset_may_stand_in_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: metro-tiny\n")
    assert read_run(["--config", str(file)]) == PRESETS["metro-tiny"]()
    assert read_run(["--config", str(file), "--preset", "metro-xl"]) == PRESETS["metro-xl"]()


def test_parse_run_resolves_and_validates():
    run = parse_run(["--preset", "metro-tiny", "--tokenizer-model", "a.model", "--global-batch-size", "none"], 2)
    assert run.training.global_batch_size == 8
    assert (run.data.decoder_seq_length, run.tokenizer.tokenizer_type) == (128, "SentencePieceTokenizer")


BAD_WORDS = [  # words, parts of the message
    ("--hiden-size 64", ["--hiden-size", "nearest is --hidden-size"]),
    ("--hidden 64", ["--hidden", "nearest is --hidden-"]),
    ("--tensor-model-parallel 2", ["--tensor-model-parallel-size"]),
    ("-lr 1", ["'-lr'", "--lr"]),
    ("--LR 1", ["--LR", "nearest"]),
    ("--hidden_size 64", ["--hidden_size", "nearest is --hidden-size"]),
    ("64", ["'64'", "flags start with --"]),
    ("--bf16 64", ["'64'", "flags start with --"]),
    ("--lr", ["--lr", "expected one argument"]),
    ("--lr 1 2", ["'2'"]),
    ("--lr 1 --lr 2", ["--lr", "already set", "once"]),
    ("--seq-length 8 --encoder-seq-length 8", ["--encoder-seq-length", "already set by --seq-length"]),
    ("--bf16 --no-bf16", ["--no-bf16", "already set by --bf16"]),
    ("--num-layers 2 --num-layers 2", ["--num-layers", "once"]),
    ("--recompute-activations --recompute-granularity full", ["--recompute-granularity", "--recompute-activations"]),
    ("--preset metro-tiny --preset metro-xl", ["--preset", "once"]),
    ("--preset metro", ["--preset", "'metro'", "metro-large++"]),
    ("--config missing.yaml", ["--config missing.yaml", "cannot be read"]),
    ("--config /", ["--config /", "cannot be read"]),
    ("--train-iters 1e3", ["--train-iters", "'1e3'", "write 1000"]),
    ("--train-iters 1.5", ["--train-iters", "'1.5'", "digits"]),
    ("--train-iters 10_000", ["--train-iters", "'10_000'"]),
    ("--train-iters 0x10", ["--train-iters", "'0x10'"]),
    ("--train-iters 0", ["--train-iters", "0", "at least 1"]),
    ("--train-iters -5", ["--train-iters", "-5", "at least 1"]),
    ("--train-iters 99999999999999999999", ["--train-iters", "10^18"]),
    ("--train-iters ١٢", ["--train-iters", "whole number"]),
    ("--train-iters nan", ["--train-iters", "'nan'"]),
    ("--lr nan", ["--lr", "'nan'", "finite"]),
    ("--lr inf", ["--lr", "'inf'", "finite"]),
    ("--lr 1e999", ["--lr", "'1e999'", "finite"]),
    ("--lr 0", ["--lr", "more than 0"]),
    ("--lr 1_0", ["--lr", "'1_0'"]),
    ("--lr fast", ["--lr", "'fast'"]),
    ("--lr none", ["--lr", "'none'"]),
    ("--weight-decay -0.1", ["--weight-decay", "-0.1", "at least 0"]),
    ("--hidden-dropout 1.0", ["--hidden-dropout", "1.0", "less than 1"]),
    ("--mask-prob 1", ["--mask-prob", "less than 1"]),
    ("--mask-token-prob 1.5", ["--mask-token-prob", "at most 1"]),
    ("--adam-beta2 1.0", ["--adam-beta2", "less than 1"]),
    ("--seed -1", ["--seed", "at least 0"]),
    ("--encoder-num-layers 0", ["--encoder-num-layers", "at least 1"]),
    ("--encoder-num-layers 1000000000", ["--encoder-num-layers", "at most 10000"]),
    ("--activation swish", ["--activation", "'swish'", "relu, gelu, gated-gelu"]),
    ("--lr-decay-style WSD", ["--lr-decay-style", "'WSD'", "linear"]),
    ("--rampup-batch-size 8 8", ["--rampup-batch-size", "expected 3"]),
    ("--rampup-batch-size 8 8 x", ["--rampup-batch-size", "'x'"]),
    ("--data-path", ["--data-path", "expected at least one"]),
    ("--bf16=true", ["--bf16", "'true'"]),
    ("--swiglu", ["--swiglu", "--activation gated-gelu"]),
    ("--context-parallel-size 2", ["--context-parallel-size", "'2'", "give 1"]),
]


@pytest.mark.parametrize(("words", "parts"), BAD_WORDS, ids=[words for words, _ in BAD_WORDS])
def test_bad_words_are_refused_in_one_line(words, parts):
    with pytest.raises(ConfigError) as refusal:
        parse_run(words.split(), 1)
    message = str(refusal.value)
    assert len(message.splitlines()) == 1
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("value", ["", "  ", "a\nb", "\x1b[31m", "a\x00b", "\udcff"])
def test_text_that_is_empty_or_cannot_be_printed_is_refused(value):
    with pytest.raises(ConfigError, match=r"^--save: ") as refusal:
        read_run(["--save", value])
    assert str(refusal.value).isprintable()


def test_a_long_value_is_shortened():
    with pytest.raises(ConfigError) as refusal:
        read_run(["--seed", "x" * 1_000_000])
    assert len(str(refusal.value)) < 200


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        read_run(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section in dataclasses.fields(RunConfig):
        assert f"{section.name}: " in text
        assert " ".join(type(section.default).__doc__.split()) in text
    for setting in list_settings().values():
        assert all(spelling in text for spelling in (*setting.flags, *setting.negatives))
        assert " ".join(setting.metadata["help"].split()[:3]) in text
    for preset in PRESETS:
        assert preset in text
    assert "(default: 0.0004)" in text
    assert "{constant,linear,cosine,inverse-square-root}" in text
    assert "--swiglu" not in text


def test_every_setting_has_help_and_a_sensible_default():
    for setting in list_settings().values():
        assert setting.metadata["help"]
        assert setting.metadata.keys() <= {
            *("help", "alias", "nargs", "negative", "minimum", "maximum", "above", "below"),
        }
        assert setting.is_list == ("nargs" in setting.metadata)


def test_the_dump_is_dotted_sorted_and_complete():
    lines = format_config(PRESETS["metro-tiny"]()).splitlines()
    assert lines[0].strip("-") == " arguments "
    assert lines[-1].strip("-") == " end of arguments "
    names = [line.split()[0] for line in lines[1:-1]]
    assert names == sorted(names, key=str.lower)
    assert set(names) == set(list_settings())
    assert "  hidden_size " + "." * 37 + " 64" in lines


SAVED = {
    **{name: setting.default for name, setting in list_settings().items()},
    "hidden_size": 64,
    "vocab_size": 300,
    "encoder_seq_length": 128,
    "decoder_seq_length": 128,
    "tokenizer_model": "old.model",
    "vocab_extra_ids": 64,
    "lr": 0.5,
}


def read_with_checkpoint(words, saved, *, goes_on=True):
    return read_run(words.split(), read_saved=lambda checkpoint: (saved, goes_on))


def test_a_checkpoint_gives_architecture_tokenizer_and_lengths():
    run = read_with_checkpoint("--load run --use-checkpoint-args --preset metro-base", SAVED)
    assert (run.model.hidden_size, run.model.vocab_size, run.data.encoder_seq_length) == (64, 300, 128)
    assert (run.tokenizer.tokenizer_model, run.tokenizer.vocab_extra_ids) == ("old.model", 64)
    assert run.optimizer.lr == PRESETS["metro-base"]().optimizer.lr
    assert read_with_checkpoint("--load run --preset metro-base", SAVED).model.hidden_size == 768
    first_start = read_with_checkpoint("--load run --use-checkpoint-args --hidden-size 32", {})
    assert first_start.model.hidden_size == 32


@pytest.mark.parametrize(
    ("words", "flag", "saved"),
    [
        ("--hidden-size 32", "--hidden-size 32", "has 64"),
        ("--seq-length 64", "--encoder-seq-length 64", "has 128"),
        ("--vocab-extra-ids 32", "--vocab-extra-ids 32", "has 64"),
        ("--num-layers 2", "--encoder-num-layers 2|--decoder-num-layers 2", "has 12"),
    ],
)
def test_flags_that_contradict_the_checkpoint_are_named(words, flag, saved):
    with pytest.raises(
        ConfigError, match=rf"({flag}) contradicts --use-checkpoint-args, whose checkpoint {saved}; drop"
    ):
        read_with_checkpoint(f"--load run --use-checkpoint-args {words}", SAVED)


def test_flags_that_agree_and_a_tokenizer_that_moved_are_taken():
    run = read_with_checkpoint("--load run --use-checkpoint-args --hidden-size 64 --tokenizer-model new.model", SAVED)
    assert (run.model.hidden_size, run.tokenizer.tokenizer_model) == (64, "new.model")


def test_another_objective_brings_its_own_networks_and_target_length():
    run = read_with_checkpoint("--load run --use-checkpoint-args --finetune --objective t5-span", SAVED)
    assert (run.model.generator_num_layers, run.data.decoder_seq_length) == (0, None)


def test_a_checkpoint_gives_the_schedule_whatever_the_flags_say():
    words = "--load run --use-checkpoint-opt-param-scheduler --lr 0.25 --weight-decay 0.5 --adam-beta1 0.5"
    found = read_with_checkpoint(words, SAVED).optimizer
    assert (found.lr, found.weight_decay, found.adam_beta1) == (0.5, SAVED["weight_decay"], 0.5)
    assert read_with_checkpoint(words, SAVED, goes_on=False).optimizer.lr == 0.25
    assert read_with_checkpoint(words, {}, goes_on=False).optimizer.lr == 0.25


def test_a_generator_that_spactor_has_dropped_does_not_contradict_its_flag():
    words = "--load run --use-checkpoint-args --preset spactor-base"
    saved = {**SAVED, "objective": "spactor", "generator_num_layers": 0}
    assert read_with_checkpoint(f"{words} --generator-num-layers 3", saved).model.generator_num_layers == 3
    assert read_with_checkpoint(words, saved).model.generator_num_layers == 0


FINE_TUNING = Tool(start=fine_tuning())


def tune_from(words, *, goes_on=False, **saved):
    values = {**SAVED, "generator_num_layers": 4, **saved}
    words = ["--pretrained-checkpoint", "run", *words.split()]
    return read_run(words, read_saved=lambda checkpoint: (values, goes_on), tool=FINE_TUNING)


def test_fine_tuning_has_the_main_model_of_its_checkpoint():
    run = tune_from("", copy_mechanism=True, rtd_position="decoder", num_attention_heads=8)
    assert (run.objective.objective, run.model.hidden_size, run.tokenizer.tokenizer_model) == (
        "text-to-text",
        64,
        "old.model",
    )
    assert (run.model.generator_num_layers, run.model.copy_mechanism, run.model.rtd_position) == (0, False, "encoder")
    assert (run.data.encoder_seq_length, run.data.decoder_seq_length) == (128, None)
    assert (run.optimizer.lr, run.training.train_iters) == (1e-4, 1000)
    run = resolve(run, 1)
    validate(run, 1)
    assert run.data.decoder_seq_length == 128


def test_a_new_run_chooses_its_lengths_and_its_dropout():
    words = "--encoder-seq-length 64 --decoder-seq-length 16 --hidden-dropout 0.3 --attention-dropout 0.2"
    run = tune_from(words)
    assert (run.data.encoder_seq_length, run.data.decoder_seq_length) == (64, 16)
    assert (run.model.hidden_dropout, run.model.attention_dropout) == (0.3, 0.2)
    for flag in ("--encoder-seq-length 64", "--decoder-seq-length 16", "--hidden-dropout 0.3"):
        with pytest.raises(ConfigError, match=f"{flag} contradicts"):
            tune_from(flag, goes_on=True, objective="text-to-text")


def test_fine_tuning_starts_from_something():
    with pytest.raises(ConfigError, match="--pretrained-checkpoint: there is no checkpoint"):
        read_run([], read_saved=lambda checkpoint: ({}, False), tool=FINE_TUNING)
    with pytest.raises(ConfigError, match="--objective t5-span is pretraining"):
        require_fine_tuning(tune_from("--objective t5-span"))
    require_fine_tuning(tune_from(""))


def test_help_shows_the_defaults_of_its_tool(capsys):
    for tool, default in ((FINE_TUNING, "0.0001"), (Tool(description="to be shown"), "0.0004")):
        with pytest.raises(SystemExit):
            read_run(["--help"], tool=tool)
        shown = " ".join(capsys.readouterr().out.split())
        assert f"peak learning rate (default: {default})" in shown
        assert ("to be shown" in shown) == (tool is not FINE_TUNING)
