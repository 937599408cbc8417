"""The YAML file: written and read back exactly; everything but plain settings refused with its line."""

import pytest

from megatron_metro.config.cli import load_config, parse_run, read_run, save_config
from megatron_metro.config.errors import ConfigError, StorageError
from megatron_metro.config.presets import PRESETS
from megatron_metro.config.schema import RunConfig

TRICKY = [
    ["--save", "none of these: # [x] {y} *z &a !t", "--load", "null", "--tokenizer-model", "007"],
    ["--save", " leading and trailing ", "--tensorboard-dir", "ünïcode 漢字", "--data-cache-path", "~"],
    ["--lr", "1e-300", "--adam-eps", "0.1", "--norm-epsilon", "3.3333333333333335e-05", "--peak-tflops", "1e22"],
    ["--data-path", "30", "true", "70", "no"],
    ["--rampup-batch-size", "4", "4", "100", "--relative-attention", "none", "--rtd-head", "none"],
    ["--save", "x" * 500 + " " + "y" * 500],
]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back(name, tmp_path):
    path = tmp_path / "folder" / "config.yaml"
    run = parse_run(["--preset", name, "--tokenizer-model", "tok.model"], 4)
    save_config(run, path)
    assert load_config(path) == run
    assert parse_run(["--config", str(path)], 4) == run
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("words", TRICKY)
def test_tricky_values_come_back(words, tmp_path):
    run = read_run(words)
    save_config(run, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == run


def test_a_file_is_replaced_whole_and_a_failure_leaves_the_old_one(tmp_path):
    path = tmp_path / "c.yaml"
    save_config(RunConfig(), path)
    save_config(PRESETS["metro-tiny"](), path)
    assert load_config(path) == PRESETS["metro-tiny"]()
    with pytest.raises(StorageError):
        save_config(RunConfig(), path / "below-a-file.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "hidden_size: 64\nlr: 4e-4\nbf16: true\ndata_path: [30, a, 70, b]\nsave: null",
        "hidden-size: 64\nlr: .0004\nbf16: True\ndata-path:\n- '30'\n- a\n- 70\n- b\n",
        "model:\n  hidden_size: 64\noptimizer: {lr: 4e-4, bf16: true}\ndata:\n  data_path: [30, a, 70, b]\nlogging:\n",
        "\ufeff# comment\nhidden_size: 64\nlr: 0.0004\nbf16: true\ndata_path: [30, a, 70, b]",
    ],
)
def test_forms_of_a_file(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    words = ["--hidden-size", "64", "--lr", "4e-4", "--bf16", "--data-path", "30", "a", "70", "b"]
    assert read_run(["--config", str(path)]) == read_run(words)


def test_an_empty_file_sets_nothing(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    assert load_config(tmp_path / "run.yaml") == RunConfig()


def test_megatron_flags_mean_the_same_in_a_file(tmp_path, caplog):
    (tmp_path / "run.yaml").write_text("num_layers: 6\nuse_cpu_initialization: true\noptimizer: {optimizer: adam}\n")
    assert load_config(tmp_path / "run.yaml").model.decoder_num_layers == 6
    assert "use_cpu_initialization is ignored" in caplog.text


BAD_FILES = [  # text, parts of the message
    ("hidden_size: 64\nhiden_size: 64", ["line 2", "hiden_size", "nearest is hidden_size"]),
    ("hidden_size: 64\nhidden_size: 64", ["line 2", "already set", "line 1"]),
    ("hidden_size: 64\nmodel:\n  hidden-size: 64", ["line 3", "already set", "line 1"]),
    ("seq_length: 8\nencoder_seq_length: 8", ["line 2", "already set"]),
    ("model:\n  lr: 1.0", ["line 2", "not a setting of model", "optimizer"]),
    ("modl:\n  lr: 1.0", ["line 1", "'modl'", "sections are"]),
    ("hidden_size:\n  - 1\n  - 2", ["hidden_size", "2 values"]),
    ("hidden_size: [[1]]", ["nested"]),
    ("hidden_size: [{a: 1}]", ["nested"]),
    ("model: {hidden_size: {a: 1}}", ["nested"]),
    ("hidden_size: 1e3", ["line 1", "'1e3'", "write 1000"]),
    ("hidden_size: null", ["line 1", "no value"]),
    ("hidden_size: ''", ["line 1", "empty"]),
    ("lr: .nan", ["line 1", "'.nan'"]),
    ("bf16: yes", ["line 1", "'yes'", "true or false"]),
    ("bf16: 1", ["line 1", "'1'", "true or false"]),
    ("lr: !!float 1", ["line 1", "tag"]),
    ("lr: !!python/object/apply:os.system ['true']", ["line 1", "tag"]),
    ("a: &x 1\nlr: *x", ["line 1", "anchor"]),
    ("<<: {lr: 1}", ["line 1"]),
    ("lr: 1\n---\nlr: 2", ["not valid YAML", "line 2"]),
    ("\tlr: 1", ["not valid YAML", "line 1"]),
    ("lr: [1", ["not valid YAML", "line 1"]),
    ("- lr", ["key: value"]),
    ("just text", ["key: value"]),
    ("[lr, 1]: 2", ["line 1", "key"]),
    ("preset: metro", ["line 1", "'metro'", "metro-tiny"]),
    ("preset: [a, b]", ["line 1", "not a preset"]),
    ("swiglu: true", ["line 1", "not supported", "gated-gelu"]),
    ("rampup_batch_size: [8, 8]", ["line 1", "2 values", "give 3"]),
    ("[" * 100_000, ["too deeply"]),
    ("hidden_size: 64\nsave: \x01", ["not valid YAML"]),
    ("#" * 1_000_001, ["larger than"]),
]


@pytest.mark.parametrize(("text", "parts"), BAD_FILES, ids=[text[:30] for text, _ in BAD_FILES])
def test_bad_files_are_refused_in_one_line(text, parts, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        load_config(path)
    message = str(refusal.value)
    assert "run.yaml" in message
    assert len(message.splitlines()) == 1
    assert all(part in message for part in parts), message


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"lr: 1\nsave: \xff")
    with pytest.raises(ConfigError, match="byte 12 is not UTF-8"):
        load_config(tmp_path / "run.yaml")


def test_nothing_is_expanded(tmp_path):
    (tmp_path / "run.yaml").write_text("save: $HOME/${USER}/~/`id`")
    assert load_config(tmp_path / "run.yaml").checkpoint.save == "$HOME/${USER}/~/`id`"
