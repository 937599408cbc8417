"""Whatever a user gets wrong: one line that names the flag or file, its exit code on every rank, nothing half-written.

Verdicts on a run come before any process group: a child that starts one ends with another exit code.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.corpus import Corpus, build_corpus
from tests.helpers.repository import ROOT
from tests.helpers.tool_server import ToolRun, ToolServer

SMALL = (
    "--preset", "metro-tiny", "--vocab-extra-ids", 64, "--encoder-seq-length", 32, "--lr-warmup-iters", 0,
    "--eval-iters", 0,
)  # fmt: skip
JOIN_SECONDS = 60.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def saved(server: ToolServer, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, saved."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    result = server.run("pretrain", *SMALL, *inputs(corpus), "--train-iters", 3, "--save", folder)
    assert (result.code, result.err) == (0, "")
    assert "starting from random weights" in result.out
    return folder


def inputs(corpus: Corpus) -> list[object]:
    return ["--tokenizer-model", corpus.model, "--data-path", corpus.prefix]


def list_files(folder: Path) -> dict[str, int]:
    """Everything below a folder, hidden files too, with sizes."""
    return {str(path.relative_to(folder)): path.lstat().st_size for path in sorted(folder.rglob("*"))}


def assert_refused(result: ToolRun, code: int, *words: str) -> None:
    assert result.code == code, result.err
    assert all(word in result.error for word in words), (words, result.error)
    assert result.out == ""


# Flags of pretrain.py after those of a run that works, the exit code, and what the line must name.
RUNS = {
    "misspelt flag": ("--hiden-size 3", 64, ["'--hiden-size'", "--hidden-size"]),
    "abbreviated flag": ("--clip 1", 64, ["'--clip'", "--clip-grad"]),
    "flag given twice": ("--lr 1 --lr 2", 64, ["--lr", "set it once"]),
    "wrong value": ("--train-samples 1e3", 64, ["--train-samples", "1e3", "1000"]),
    "refused flag": ("--fp8-format e4m3", 64, ["--fp8-format", "--bf16"]),
    "heads and width": ("--num-attention-heads 3", 64, ["--hidden-size 64", "--num-attention-heads 3", "2 or 4"]),
    "heads and ranks": ("--num-attention-heads 1 --tensor-model-parallel-size 2", 64, ["--num-attention-heads 1"]),
    "vocabulary": ("--make-vocab-size-divisible-by 200", 64, ["200", "128 or 256"]),
    "batch": ("--global-batch-size 20", 64, ["--global-batch-size 20", "16 or 24"]),
    "world": ("--tensor-model-parallel-size 4", 64, ["--tensor-model-parallel-size 4", "found 2", "start 4"]),
    "positions": ("--max-position-embeddings 16", 64, ["--encoder-seq-length 32", "--max-position-embeddings 16"]),
    "sequence parallel": ("--sequence-parallel", 64, ["--sequence-parallel", "found 1"]),
    "layout": (
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Gg*2Me*2RDd*2L",
        64,
        ["--pipeline-model-parallel-layout", "nearest legal layout"],
    ),
    "pieces": ("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 9", 64, ["9", "at most 5"]),
    "vocabulary of another tokenizer": ("--vocab-size 1000", 64, ["--vocab-size 1000", "264"]),
    "nothing to train": ("--generator-num-layers 0 --lm-loss-weight 0", 64, ["--lm-loss-weight 0"]),
    "device": ("--device cuda", 64, ["--device"]),
    "back end": ("--distributed-backend nccl", 64, ["--distributed-backend"]),
    "config file": ("--config {tmp}/none.yaml", 64, ["--config", "none.yaml"]),
    "folder that is a file": ("--save {text}", 74, ["--save", "text.jsonl"]),
    "folder that cannot be": ("--tensorboard-dir {text}/deep", 74, ["--tensorboard-dir", "text.jsonl"]),
    "later step": ("--save {saved}", 66, ["--save", "iteration 3", "--load"]),
    "later step than resumed": ("--load {tmp}/none --save {saved}", 66, ["--save", "iteration 3"]),
    "step that is not there": ("--load {saved} --ckpt-step 2", 66, ["iter_0000002", "saved iterations: 3"]),
    "file instead of folder": ("--load {text}", 66, ["--load", "is a file"]),
    "step instead of folder": ("--load {saved}/iter_0000003", 66, ["--load", "--ckpt-step 3"]),
    "no checkpoint": ("--load {tmp} --exit-on-missing-checkpoint", 66, ["--load"]),
}


@pytest.mark.parametrize("fault", RUNS)
def test_every_rank_refuses_before_any_process_group(server, corpus, saved, tmp_path, fault):
    text, code, words = RUNS[fault]
    flags = text.format(tmp=tmp_path, text=corpus.jsonl, saved=saved).split()
    before = list_files(saved), list_files(corpus.folder)
    ranks = server.run_ranks(
        "pretrain",
        *SMALL,
        *("--train-iters", 2) * (fault != "wrong value"),
        *inputs(corpus),
        *flags,
        world_size=2,
        may_start_groups=False,
    )
    for result in ranks:
        assert_refused(result, code, *words)
    assert ranks[0].err == ranks[1].err
    assert list(tmp_path.iterdir()) == [] and (list_files(saved), list_files(corpus.folder)) == before


def remove_tokens(prefix: str) -> None:
    Path(f"{prefix}.bin").unlink()


def empty_tokens(prefix: str) -> None:
    Path(f"{prefix}.bin").write_bytes(b"")


def cut_tokens(prefix: str) -> None:
    os.truncate(f"{prefix}.bin", 1000)


def cut_index(prefix: str) -> None:
    os.truncate(f"{prefix}.idx", 100)


def flip_bit(prefix: str) -> None:
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[500] ^= 1
    Path(f"{prefix}.bin").write_bytes(content)


def damage_manifest(prefix: str) -> None:
    Path(f"{prefix}.json").write_text("{")


def swap_tokenizer(prefix: str) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_sha256": "0" * 64}))


DATA_FAULTS: dict[Callable[[str], None], str] = {
    remove_tokens: "copy.bin is missing",
    empty_tokens: "copy.bin is empty",
    cut_tokens: "copy.bin has 1000 bytes",
    cut_index: "copy.idx has 100 bytes",
    flip_bit: "copy.bin is damaged",
    damage_manifest: "copy.json is damaged",
    swap_tokenizer: "made with tokenizer 000000000000",
}


@pytest.mark.parametrize("fault", DATA_FAULTS, ids=lambda fault: fault.__name__)
def test_damaged_data_is_refused_before_any_process_group(server, corpus, tmp_path, fault):
    for suffix in ("bin", "idx", "json"):
        shutil.copy(f"{corpus.prefix}.{suffix}", tmp_path / f"copy.{suffix}")
    fault(f"{tmp_path}/copy")
    before = list_files(tmp_path)
    flags = ("--tokenizer-model", corpus.model, "--data-path", tmp_path / "copy", "--save", tmp_path / "run")
    ranks = server.run_ranks("pretrain", *SMALL, "--train-iters", 2, *flags, world_size=2, may_start_groups=False)
    for result in ranks:
        assert_refused(result, 65, DATA_FAULTS[fault])
    assert list_files(tmp_path) == before


def test_ignored_flags_are_named_once(server, corpus, tmp_path):
    flags = ("--tokenizer-model", corpus.model, "--data-path", tmp_path / "none", "--no-save-rng")
    ranks = server.run_ranks("pretrain", *SMALL, *flags, world_size=2, may_start_groups=False)
    assert [result.err.count("--no-save-rng is ignored") for result in ranks] == [1, 0]
    assert [result.err.count("error: ") for result in ranks] == [1, 1]


# A tool, its flags, the exit code and what the line must name.
COMMANDS = [
    ("preprocess_data", "--inptu x", 64, ["'--inptu'", "--input"]),
    ("preprocess_data", "--input {text}", 64, ["--output-prefix"]),
    ("preprocess_data", "--input {text} --output-prefix {tmp}/ --tokenizer-model {model}", 64, ["--output-prefix"]),
    ("preprocess_data", "--input {text} --output-prefix {tmp}/a --tokenizer-model {model} --workers 0", 64, ["0"]),
    ("preprocess_data", "--input {text} --output-prefix {tmp}/a --tokenizer-model {text}", 64, [".model"]),
    ("preprocess_data", "--input {text} --output-prefix {tmp}/a --tokenizer-model {tmp}/no.model", 65, ["no.model"]),
    ("preprocess_data", "--input {text} --output-prefix {tmp}/a --tokenizer-model {model} --vocab-size 9", 64, ["9"]),
    ("preprocess_data", "--input {tmp}/no --output-prefix {tmp}/a --tokenizer-model {model}", 65, ["--input", "no"]),
    ("preprocess_data", "--input {text} --output-prefix {text}/a --tokenizer-model {model}", 74, ["text.jsonl/a"]),
    (
        "preprocess_data",
        "--input {text} --json-keys ../x --output-prefix {tmp}/a --tokenizer-model {model}",
        64,
        ["../x"],
    ),
    (
        "train_tokenizer",
        "--input {text} --output-prefix {tmp}/a --vocab-sise 9",
        64,
        ["'--vocab-sise'", "--vocab-size"],
    ),
    ("train_tokenizer", "--input {text} --output-prefix {tmp}/a --vocab-size 3", 64, ["--vocab-size", "3"]),
    ("train_tokenizer", "--input {text} --output-prefix {tmp}/a --vocab-size 9999999", 64, ["9999999", "largest"]),
    ("train_tokenizer", "--input {text} --output-prefix {tmp}/a --character-coverage 7", 64, ["--character-coverage"]),
    ("train_tokenizer", "--input {text} --output-prefix {text}/a --vocab-size 200", 74, ["--output-prefix"]),
    ("merge_datasets", "--input {tmp}/no --output-prefix {tmp}/a", 65, ["--input", "no"]),
    ("merge_datasets", "--input {corpus} --output-prefix {tmp}/a", 65, ["split_lines"]),
    ("merge_datasets", "--input {corpus} --output-prefix {corpus}/train_text_document", 64, ["--output-prefix"]),
    ("inspect_data", "--num-sampels 3", 64, ["'--num-sampels'", "--num-samples"]),
    ("inspect_data", "--num-samples 0", 64, ["--num-samples", "0"]),
    ("inspect_data", "--part test", 64, ["--part", "'test'"]),
    ("plan", "--layout-tabel --preset metro-base", 64, ["'--layout-tabel'", "--layout-table"]),
    ("plan", "--layout-table --preset metro-bse", 64, ["'metro-bse'", "metro-base"]),
    ("plan", "--layout-table --preset metro-base --vocab-size 16777217", 64, ["--vocab-size", "at most 16777216"]),
    ("plot_run", "{tmp}/no", 65, ["no", "give the folder of a run"]),
    ("plot_run", "{saved} --ouput {tmp}/a.png", 64, ["'--ouput'", "--output"]),
    ("plot_run", "{saved} --output {text}/a.png", 74, ["text.jsonl/a.png"]),
    ("benchmark", "stp", 64, ["'stp'", "step"]),
    ("benchmark", "step --round 1", 64, ["'--round'", "--rounds"]),
]


@pytest.mark.parametrize(("tool", "text", "code", "words"), COMMANDS)
def test_every_tool_refuses_in_one_line(server, corpus, saved, tmp_path, tool, text, code, words):
    flags = text.format(tmp=tmp_path, text=corpus.jsonl, model=corpus.model, saved=saved, corpus=corpus.folder)
    before = list_files(corpus.folder)
    assert_refused(server.run(tool, *flags.split()), code, *words)
    assert list(tmp_path.iterdir()) == [] and list_files(corpus.folder) == before


TEXTS = {
    "empty": (b"", "text.jsonl"),
    "blank": (b"\n \n", "text.jsonl"),
    "not JSON": (b'{"text": "a"}\nhello\n', "text.jsonl:2"),
    "cut off": (b'{"text": "a"}\n{"text": "b', "text.jsonl:2"),
    "missing key": (b'{"title": "a"}\n', "text.jsonl:1 has no key 'text'"),
    "invalid UTF-8": (b'{"text": "\xff"}\n', "text.jsonl:1 is not valid UTF-8"),
}


@pytest.mark.parametrize("fault", TEXTS)
def test_bad_text_leaves_nothing(server, corpus, tmp_path, fault):
    content, word = TEXTS[fault]
    text = tmp_path / "text.jsonl"
    text.write_bytes(content)
    flags = ("--input", text, "--output-prefix", tmp_path / "out", "--tokenizer-model", corpus.model, "--workers", 2)
    assert_refused(server.run("preprocess_data", *flags), 65, word)
    assert list(tmp_path.iterdir()) == [text]


def test_input_is_never_written_over(server, corpus, tmp_path):
    text = tmp_path / "a_text_document.json"
    text.write_text('{"text": "a"}\n')
    flags = ("--input", text, "--output-prefix", tmp_path / "a", "--tokenizer-model", corpus.model)
    assert_refused(server.run("preprocess_data", *flags), 64, "--output-prefix", text.name)
    assert list(tmp_path.iterdir()) == [text] and text.read_text() == '{"text": "a"}\n'


def test_text_that_spells_special_tokens_stays_text(server, corpus, tmp_path):
    text = tmp_path / "text.jsonl"
    spelt = "<s> </s> <pad> <unk> [MASK] <sen000> <extra_id_0>"
    text.write_text("".join(json.dumps({"text": f"{spelt} {i}"}) + "\n" for i in range(40)))
    flags = ("--input", text, "--output-prefix", tmp_path / "out", "--tokenizer-model", corpus.model)
    first = server.run("preprocess_data", *flags)
    assert (first.code, first.err) == (0, "")
    written = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    assert server.run("preprocess_data", *flags, "--workers", 2).code == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*")} == written
    run = ("--data-path", tmp_path / "out_text_document", "--tokenizer-model", corpus.model, "--split", "1,0,0")
    shown = server.run("inspect_data", *SMALL, *run, "--verify")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.count("</s>") < 40  # ends of documents, none of them spelt


@pytest.mark.parametrize("fault", ["interrupt", "killed worker"])
def test_preprocessing_that_is_stopped_leaves_nothing(server, tmp_path, fault):
    text = tmp_path / "text.jsonl"
    text.write_text((json.dumps({"text": "17 23 42 " * 2000}) + "\n") * 3000)
    flags = ("--input", text, "--output-prefix", tmp_path / "out", "--tokenizer-type", "NullTokenizer")
    running = server.start("preprocess_data", *flags, "--vocab-size", 1000, "--workers", 2)
    wait_until(lambda: len(running.list_children()) == 2 and any(tmp_path.glob(".out*")))
    if fault == "interrupt":
        os.kill(running.pid, signal.SIGINT)
        assert_refused(running.finish(), 130, "interrupted")
    else:
        os.kill(running.list_children()[0], signal.SIGKILL)
        assert_refused(running.finish(), 70, "preprocessing worker", "SIGKILL")
    assert list(tmp_path.iterdir()) == [text]


def test_a_killed_data_worker_ends_the_run(server, corpus, tmp_path):
    flags = ("--train-iters", 10**6, "--num-workers", 1, "--log-interval", 1, "--save", tmp_path / "run")
    running = server.start("pretrain", *SMALL, *inputs(corpus), *flags)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)
    workers = [pid for pid in running.list_children() if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGKILL)
    result = running.finish()
    assert result.code == 70
    assert re.search(r"data worker 0 \(pid \d+\) was killed by SIGKILL", result.error)
    assert not list((tmp_path / "run").glob("iter_*"))


CHECKPOINT_FAULTS = {
    "empty tracker": ("latest_checkpointed_iteration.txt", b"", "not a number"),
    "tracker of another step": ("latest_checkpointed_iteration.txt", b"7", "iter_0000007"),
    "damaged manifest": ("iter_0000003/manifest.json", b"{", "manifest.json"),
    "cut shard": ("iter_0000003/__0_0.distcp", b"PK", "iter_0000003"),
    "cut metadata": ("iter_0000003/.metadata", b"\x80", "iter_0000003"),
}


@pytest.mark.parametrize("fault", CHECKPOINT_FAULTS)
def test_a_damaged_checkpoint_is_refused_on_every_rank(server, corpus, saved, tmp_path, fault):
    name, content, word = CHECKPOINT_FAULTS[fault]
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    before = list_files(tmp_path)
    flags = ("--train-iters", 5, "--lr-decay-iters", 3, "--load", tmp_path / "run", "--save", tmp_path / "run")
    for result in server.run_ranks("pretrain", *SMALL, *inputs(corpus), *flags, world_size=2):
        assert_refused(result, 66, word)
    assert list_files(tmp_path) == before


UNLIKE_RANKS = {
    "number": ("--lr 0.25", ["rank 1 has --lr 0.25 and rank 0 has --lr 0.001"]),
    # Unlike layouts make unlike groups: without a check the ranks wait for each other until the time-out.
    "tensor size": ("--tensor-model-parallel-size 2 --global-batch-size 16", ["--tensor-model-parallel-size 2"]),
    "stages": ("--pipeline-model-parallel-size 2", ["--pipeline-model-parallel-size 2"]),
}


@pytest.mark.parametrize("fault", UNLIKE_RANKS)
def test_unlike_ranks_refuse_alike(server, corpus, tmp_path, fault):
    own, words = UNLIKE_RANKS[fault]
    flags = (*SMALL, *inputs(corpus), "--train-iters", 2, "--save", tmp_path / "run")
    for result in server.run_ranks("pretrain", *flags, world_size=2, last_flags=own.split()):
        assert_refused(result, 64, "rank 1 has", "start all ranks alike", *words)
    assert list_files(tmp_path / "run") == {}


def test_a_mistyped_load_does_not_pass_for_a_resumed_run(server, corpus, saved, tmp_path):
    flags = (*SMALL, *inputs(corpus), "--train-iters", 3, "--load")
    fresh = server.run("pretrain", *flags, tmp_path / "none")
    assert fresh.code == 0 and f"WARNING: --load {tmp_path}/none holds no checkpoint" in fresh.out
    resumed = server.run("pretrain", *flags, saved)
    assert resumed.code == 0 and "at iteration 3: 0 iterations are left" in resumed.out


def test_torchrun_fails_with_the_verdict(corpus, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [*SMALL, *inputs(corpus), "--train-iters", 2, "--save", tmp_path / "run", "--tensor-model-parallel-sise", 2]
    result = subprocess.run(
        [*command, "tools/pretrain.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    # A rank that torchrun ends because the other one has failed says nothing.
    assert 1 <= len(errors) <= 2 and len(set(errors)) == 1
    assert "the nearest is --tensor-model-parallel-size" in errors[0]
    assert re.search(r"exitcode\s*: 64", result.stderr)
    assert list(tmp_path.iterdir()) == []


def wait_until(is_met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + JOIN_SECONDS
    while not is_met():
        assert time.monotonic() < deadline, "the tool did not get as far"
        time.sleep(0.02)
