"""What may differ between a step and the run that goes on from it, and which flag lets the rest pass."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_metro.checkpoint.start import Start
from megatron_metro.config.errors import CheckpointError
from megatron_metro.config.fields import Setting, Value, change_values, list_settings, read_value
from megatron_metro.config.presets import metro_tiny
from megatron_metro.config.presets_t5 import spactor_base
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.validation import resolve
from megatron_metro.data.loader import build_loaders
from megatron_metro.tokenizer import load_tokenizer
from megatron_metro.training.identity import check_identity, describe_identity, find_override
from tests.helpers.corpus import Corpus, build_corpus, make_config
from tests.helpers.markov import TOKENIZER, draw_documents, markov_run, write_source

IDENTITY = {
    "tokenizer_sha256": "ab" * 32,
    "text": [{"prefix": "old/text", "sha256": "cd" * 32, "documents": [0, 90], "share": 1.0}],
}
# Everything that a section's name does not say, written down a second time.
FREE = (
    *("data_path", "train_data_path", "valid_data_path", "split", "data_cache_path", "num_workers"),
    *("tokenizer_model", "tokenizer_type", "pre_tokenizer"),
    *("init_method", "init_method_std", "make_vocab_size_divisible_by", "eval_all_positions"),
)
PRECISION = ("bf16", "fp16", "loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window")
OF_TRAINING = {
    "seed": "override_data",
    "global_batch_size": "override_batch_size",
    "rampup_batch_size": "override_batch_size",
    "cpu_matmul_precision": "override_model",
}
OF_SECTION = {
    "model": "override_model",
    "objective": "override_objective",
    "data": "override_data",
    "tokenizer": "override_tokenizer",
    "optimizer": "override_opt_param_scheduler",
}


@pytest.fixture(scope="module")
def run() -> RunConfig:
    """Linear decay and a warm-up, so that every setting of the schedule counts."""
    return resolve(change_values(metro_tiny(), {"train_iters": 100, "lr_decay_style": "linear"}), 1)


def save(run: RunConfig, *, is_new_run: bool = False, **train: int) -> Start:
    """A step of the run, as its file gives it back."""
    counters = {"iteration": 10, "consumed_samples": 10 * (run.training.global_batch_size or 0)} | train
    document = {"config": dataclasses.asdict(run), "identity": IDENTITY, "train": counters}
    return Start(step=Path("iter_0000010"), document=json.loads(json.dumps(document)), is_new_run=is_new_run)


def another(setting: Setting, value: Value) -> Value:
    """Some other value of its type."""
    if setting.choices:
        return next(choice for choice in setting.choices if choice != value)
    if setting.kind is bool:
        return not value
    other = {str: "another", int: 7, float: 0.375}[setting.kind]
    return (other,) * (setting.length or 1) if setting.is_list else other


def expect_override(setting: Setting) -> str | None:
    if setting.name in FREE or setting.section in ("parallel", "checkpoint", "logging"):
        return None
    if setting.section == "training":
        return OF_TRAINING.get(setting.name)
    if setting.name in PRECISION:
        return "override_model"
    return "override_objective" if setting.name == "decoder_seq_length" else OF_SECTION[setting.section]


@pytest.mark.parametrize("name", list_settings())
def test_every_setting_may_change_or_is_refused_by_name(name: str, run: RunConfig, caplog: Any) -> None:
    setting, override = list_settings()[name], expect_override(list_settings()[name])
    changed = change_values(run, {name: another(setting, read_value(run, setting))})
    assert find_override(name) == override
    if override is None:
        check_identity(changed, IDENTITY, save(run))
        return
    flag = "--" + override.replace("_", "-")
    with pytest.raises(CheckpointError, match=f"was saved with {setting.flag} .*{flag} to change") as said:
        check_identity(changed, IDENTITY, save(run))
    assert "\n" not in str(said.value)
    others = dict.fromkeys(set(OF_SECTION.values()) | {"override_batch_size"} - {override}, True)
    with pytest.raises(CheckpointError, match="was saved with"):
        check_identity(change_values(changed, others | {override: False}), IDENTITY, save(run))
    with caplog.at_level(logging.WARNING):
        check_identity(change_values(changed, {override: True}), IDENTITY, save(run))
    assert [text.partition(" was ")[0] for text in caplog.messages] == [f"{flag}: {setting.flag}"]
    check_identity(changed, IDENTITY, save(run, is_new_run=True))


def test_old_and_new_value_are_named(run: RunConfig) -> None:
    changed = change_values(run, {"lr": 0.25, "min_lr": 0.125})
    with pytest.raises(CheckpointError) as said:
        check_identity(changed, IDENTITY, save(run))
    assert str(said.value) == (
        f"iter_0000010: was saved with --lr {run.optimizer.lr}, this run has 0.25 (and 1 more); keep it, give "
        "--override-opt-param-scheduler to change it, or --finetune for a new run"
    )


def test_the_end_of_a_decay_that_there_is_not_may_move(run: RunConfig) -> None:
    longer = {"train_iters": 200, "lr_decay_iters": None}
    constant = change_values(run, {"lr_decay_style": "constant"})
    check_identity(resolve(change_values(constant, longer), 1), IDENTITY, save(constant))
    with pytest.raises(CheckpointError, match="--lr-decay-iters 100, this run has 200"):
        check_identity(resolve(change_values(run, longer), 1), IDENTITY, save(run))
    check_identity(resolve(change_values(run, {"train_iters": 200}), 1), IDENTITY, save(run))


def test_settings_that_an_older_program_did_not_know_have_their_default(run: RunConfig) -> None:
    start = save(run)
    del start.document["config"]["objective"]["weighted_lm_loss"]
    check_identity(run, IDENTITY, start)
    with pytest.raises(CheckpointError, match="--weighted-lm-loss False, this run has True"):
        check_identity(change_values(run, {"weighted_lm_loss": True}), IDENTITY, start)


@pytest.mark.parametrize("iteration", [9, 10, 11])
def test_only_spactors_switch_drops_the_generator(iteration: int) -> None:
    whole = resolve(change_values(spactor_base(), {"spactor_tau": 10, "train_iters": 20, "lr_warmup_iters": 0}), 1)
    second = change_values(whole, {"generator_num_layers": 0})
    start = save(whole, iteration=iteration)
    if iteration == 10:
        check_identity(second, IDENTITY, start)
        return
    with pytest.raises(CheckpointError, match="--generator-num-layers"):
        check_identity(second, IDENTITY, start)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sha256": "ef" * 32}, ["--data-path old/text with sha256 cdcdcdcdcdcd", "efefefefefef"]),
        ({"documents": [0, 80]}, ["--split old/text with documents 0 to 90", "0 to 80"]),
        ({"share": 0.5}, ["--data-path old/text with share 100.0000%", "50.0000%"]),
        ({"prefix": "new/text"}, []),
    ],
)
def test_other_text_is_refused_and_moved_text_is_not(changes: dict, words: list[str], run: RunConfig) -> None:
    identity = {**IDENTITY, "text": [{**IDENTITY["text"][0], **changes}]}
    check_identity(change_values(run, {"override_data": True}), identity, save(run))
    check_identity(run, identity, save(run, is_new_run=True))
    if not words:
        check_identity(run, identity, save(run))
        return
    with pytest.raises(CheckpointError, match="give --override-data") as said:
        check_identity(run, identity, save(run))
    assert all(word in str(said.value) for word in words), said.value
    more = {**IDENTITY, "text": [*IDENTITY["text"], *identity["text"]]}
    with pytest.raises(CheckpointError, match="--data-path of 1 data sets, this run has 2"):
        check_identity(run, more, save(run))


def test_another_tokenizer_is_refused_by_new_runs_too(run: RunConfig) -> None:
    identity = {**IDENTITY, "tokenizer_sha256": "ef" * 32}
    for is_new_run in (False, True):
        start = save(run, is_new_run=is_new_run)
        with pytest.raises(CheckpointError, match=r"--tokenizer-model of checksum abab.* one of efef.*--override-tok"):
            check_identity(run, identity, start)
        check_identity(change_values(run, {"override_tokenizer": True}), identity, start)
    check_identity(run, identity, Start())


def test_a_step_that_does_not_say_what_it_is_serves_new_runs_only(run: RunConfig) -> None:
    start = save(run)
    del start.document["identity"]
    with pytest.raises(CheckpointError, match="does not say which text"):
        check_identity(run, IDENTITY, start)
    check_identity(run, IDENTITY, dataclasses.replace(start, is_new_run=True))


@pytest.mark.parametrize(
    "counted", [{"train_samples": 1600, "train_iters": None}, {"mask_prob_schedule": "0:0.1,9:0.2"}]
)
def test_what_counts_steps_in_samples_refuses_another_batch_size(counted: dict, run: RunConfig) -> None:
    run = change_values(run, counted)
    check_identity(run, IDENTITY, save(run))
    changed = change_values(run, {"global_batch_size": 32, "override_batch_size": True})
    [flag] = [name for name, value in counted.items() if value is not None]
    with pytest.raises(CheckpointError, match=f"--{flag.replace('_', '-')} .* samples in 10 steps, not 5"):
        check_identity(changed, IDENTITY, save(run))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_corpus(tmp_path_factory.mktemp("corpus"))


def test_the_identity_of_a_blend(corpus: Corpus) -> None:
    run = make_config("30", corpus.prefix, "70", corpus.prefix)
    train, _ = build_loaders(run, corpus.tokenizer, dp_rank=0, dp_size=1)
    identity = json.loads(json.dumps(describe_identity(corpus.tokenizer, train)))
    assert identity == describe_identity(corpus.tokenizer, train)
    assert identity["tokenizer_sha256"] == corpus.tokenizer.sha256
    assert [text["share"] for text in identity["text"]] == [0.3, 0.7]


def test_text_with_the_same_lengths_is_told_apart(tmp_path: Path) -> None:
    """Its index is the same to the byte."""
    found = []
    for seed in (7, 8):
        folder = tmp_path / str(seed)
        folder.mkdir()
        prefix = write_source(folder, num_documents=20, length=200, seed=seed)
        run = resolve(markov_run(prefix, tmp_path / "run", 1), 1)
        train, _ = build_loaders(run, load_tokenizer(run.tokenizer, TOKENIZER.vocab_size), dp_rank=0, dp_size=1)
        found.append(describe_identity(TOKENIZER, train)["text"][0])
    assert (tmp_path / "7" / "markov.idx").read_bytes() == (tmp_path / "8" / "markov.idx").read_bytes()
    assert (draw_documents(20, 200, 7) != draw_documents(20, 200, 8)).any()
    assert found[0]["sha256"] != found[1]["sha256"]
    assert found[0]["documents"] == found[1]["documents"]
