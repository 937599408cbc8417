"""tools/finetune.py: from a METRO with its generator to texts, at any layout, to the bit when it goes on; bad input."""

import json
import random
from pathlib import Path

import pytest

from megatron_metro.checkpoint.folder import read_document, step_folder
from megatron_metro.checkpoint.reader import open_step
from megatron_metro.data.vocabulary_training import VocabularyOptions, train_vocabulary, write_vocabulary
from megatron_metro.parallel.groups import ParallelGroups
from tests.distributed.test_bad_input import assert_refused
from tests.distributed.test_generate_tool import SMALL
from tests.distributed.test_resume_flags import assert_equal_steps
from tests.helpers.corpus import Corpus, build_corpus
from tests.helpers.exact import read_metrics
from tests.helpers.tool_server import ToolServer

LENGTHS = ("--encoder-seq-length", 32, "--decoder-seq-length", 16)
TUNING = (
    *LENGTHS, "--pack-examples", "--micro-batch-size", 2, "--global-batch-size", 4, "--train-iters", 4, "--lr", 1e-3,
    "--save-interval", 2, "--eval-interval", 2, "--eval-iters", 1, "--split", "80,20,0", "--log-interval", 1,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def pretrained(server: ToolServer, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A METRO of three steps, generator and RTD head included, saved by two stages."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    flags = (*SMALL, "--tokenizer-model", corpus.model, "--data-path", corpus.prefix, "--save", folder)
    ranks = server.run_ranks("pretrain", *flags, "--pipeline-model-parallel-size", 2, world_size=2)
    assert [(rank.code, rank.err) for rank in ranks] == [(0, "")] * 2
    return folder


@pytest.fixture(scope="module")
def pairs(corpus: Corpus) -> Path:
    """Forty examples: some words, and the first of them."""
    generator = random.Random(1)
    path = corpus.folder / "pairs.jsonl"
    texts = [generator.choice(corpus.texts).split()[: generator.randint(1, 3)] for _ in range(40)]
    lines = [{"source": " ".join(words), "target": words[0]} for words in texts if words]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_layouts_fine_tune_alike_and_what_is_learnt_can_be_written(
    server: ToolServer, pretrained: Path, pairs: Path, tmp_path: Path
) -> None:
    start = (*TUNING, "--pretrained-checkpoint", pretrained, "--data-path", pairs)
    start += ("--hidden-dropout", 0, "--attention-dropout", 0)  # a new run's own choice
    one = server.run("finetune", *start, "--save", tmp_path / "one")
    assert (one.code, one.err) == (0, ""), one.err
    for name, flags in (
        ("tp", ("--tensor-model-parallel-size", 2, "--sequence-parallel")),
        ("pp", ("--pipeline-model-parallel-size", 2)),
        ("dp", ("--use-distributed-optimizer",)),
    ):
        ranks = server.run_ranks("finetune", *start, *flags, "--save", tmp_path / name, world_size=2)
        assert [rank.code for rank in ranks] == [0, 0], ranks[0].err
        for found, expected in zip(read_metrics(tmp_path / name), read_metrics(tmp_path / "one"), strict=True):
            assert found["lm_loss"] == pytest.approx(expected["lm_loss"], rel=1e-4)
    reader = open_step(step_folder(tmp_path / "one", 4))
    before = open_step(step_folder(pretrained, 3)).weight_names()
    left = {name for name in before if name.startswith(("generator.", "mlm_head.", "rtd_head."))}
    assert left and set(reader.weight_names()) == set(before) - left
    assert reader.document["config"]["model"]["generator_num_layers"] == 0
    losses = [line["lm_loss"] for line in read_metrics(tmp_path / "one")]
    assert len(losses) == 6 and losses[-1] < losses[0]
    written = tmp_path / "texts.jsonl"
    how = ("--load", tmp_path / "one", "--input", pairs, "--output", written, "--max-new-tokens", 2)
    result = server.run("generate", *how)
    assert (result.code, result.err) == (0, ""), result.err
    assert all("output" in json.loads(line) for line in written.read_text().splitlines())


def test_a_run_that_is_started_again_goes_on_to_the_bit(
    server: ToolServer, pretrained: Path, pairs: Path, tmp_path: Path, groups: ParallelGroups
) -> None:
    start = (*TUNING, "--pretrained-checkpoint", pretrained, "--data-path", pairs)
    whole = server.run("finetune", *start, "--save", tmp_path / "whole")
    assert (whole.code, whole.err) == (0, "")
    again = (*start, "--save", tmp_path / "parts", "--load", tmp_path / "parts")
    for flags, step in ((("--exit-interval", 2), 2), ((), 4)):
        part = server.run("finetune", *again, *flags)
        assert (part.code, part.err) == (0, "")
        assert_equal_steps(tmp_path / "parts", tmp_path / "whole", step)
    train = read_document(step_folder(tmp_path / "parts", 4))["train"]
    assert (train["iteration"], train["consumed_samples"]) == (4, 16)


BAD = {
    "no checkpoint": ("--data-path {pairs}", 64, ["--pretrained-checkpoint", "folder of a run"]),
    "an empty --load": ("--data-path {pairs} --load {tmp}", 66, ["--load"]),
    "a wrong folder": ("--data-path {pairs} --pretrained-checkpoint {tmp}/none", 66, ["--pretrained-checkpoint"]),
    "no data": ("--pretrained-checkpoint {run}", 64, ["--data-path", "JSON lines"]),
    "no such data": ("--pretrained-checkpoint {run} --data-path {tmp}/none", 65, ["--data-path", "none"]),
    "a broken line": ("--pretrained-checkpoint {run} --data-path {broken}", 65, ["broken.jsonl:2 is not JSON"]),
    "an empty source": ("--pretrained-checkpoint {run} --data-path {empty}", 65, ["empty.jsonl:2", "empty"]),
    "a long target": ("--pretrained-checkpoint {run} --data-path {long}", 65, ["long.jsonl:2", "--decoder-seq-length"]),
    "a pretraining objective": (
        "--pretrained-checkpoint {run} --data-path {pairs} --objective t5-span --decoder-seq-length 8",
        64,
        ["--objective t5-span", "pretrain"],
    ),
    "another width": (
        "--pretrained-checkpoint {run} --data-path {pairs} --hidden-size 32", 64, ["--hidden-size 32", "contradicts"]
    ),
    "another tokenizer": (
        "--pretrained-checkpoint {run} --data-path {pairs} --tokenizer-model {other}",
        66,
        ["--tokenizer-model", "--override-tokenizer"],
    ),
    "too long for the positions": (
        "--pretrained-checkpoint {run} --data-path {pairs} --encoder-seq-length 2048",
        64,
        ["--encoder-seq-length 2048", "--max-position-embeddings"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(corpus: Corpus, pairs: Path) -> dict[str, Path]:
    """Inputs that cannot be used."""
    good = '{"source": "abc", "target": "abc"}\n'
    reversed_text = corpus.folder / "reversed.jsonl"
    reversed_text.write_text("".join(json.dumps({"text": text[::-1]}) + "\n" for text in corpus.texts))
    options = VocabularyOptions(inputs=(str(reversed_text),), vocab_size=200)
    other, _ = write_vocabulary(train_vocabulary(options), str(corpus.folder / "other"))
    lines = {
        "broken": "{not json",
        "empty": '{"source": "", "target": "abc"}',
        "long": json.dumps({"source": "abc", "target": "abc " * 40}),
    }
    for name, line in lines.items():
        (corpus.folder / f"{name}.jsonl").write_text(good + line + "\n")
    return {"pairs": pairs, "other": other, **{name: corpus.folder / f"{name}.jsonl" for name in lines}}


@pytest.mark.parametrize("name", BAD)
def test_what_a_user_gets_wrong_is_one_line(
    server: ToolServer, pretrained: Path, files: dict[str, Path], tmp_path: Path, name: str
) -> None:
    flags, code, words = BAD[name]
    given = flags.format(run=pretrained, tmp=tmp_path, **files).split()
    own = [word for pair in zip(LENGTHS[::2], LENGTHS[1::2]) for word in pair if pair[0] not in given]
    result = server.start("finetune", *own, *given, may_start_groups=False).finish()
    assert_refused(result, code, *words)
    assert list(tmp_path.iterdir()) == []
