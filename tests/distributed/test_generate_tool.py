"""tools/generate.py: a saved METRO with its generator, loaded into one process and into other layouts."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.corpus import Corpus, build_corpus
from tests.helpers.tool_server import ToolServer

SMALL = (
    "--preset", "metro-tiny", "--vocab-extra-ids", 64, "--encoder-seq-length", 32, "--lr-warmup-iters", 0,
    "--eval-iters", 0, "--lr", 0.02, "--train-iters", 3,
)  # fmt: skip
BEAMS = ("--decoding", "beam", "--num-beams", 2, "--length-penalty-form", "hf", "--max-new-tokens", 6)


@pytest.fixture(scope="module")
def saved(server: ToolServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, saved."""
    corpus: Corpus = build_corpus(tmp_path_factory.mktemp("corpus"))
    folder = tmp_path_factory.mktemp("saved") / "run"
    data = ("--tokenizer-model", corpus.model, "--data-path", corpus.prefix)
    result = server.run("pretrain", *SMALL, *data, "--save", folder)
    assert (result.code, result.err) == (0, "")
    return folder


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("requests") / "in.jsonl"
    texts = ["the cat", "a dog and another one", "", "we say the word and go"]
    lines = [{"source": text, "choices": ["yes", "no, never", "it is so"]} for text in texts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("flags", [BEAMS, ("--mode", "score")], ids=["beam", "score"])
def test_layouts_load_and_answer_alike(
    server: ToolServer, saved: Path, requests: Path, tmp_path: Path, flags: tuple[object, ...]
) -> None:
    how = ("--load", saved, "--input", requests, *flags)
    single = server.run("generate", *how, "--output", tmp_path / "one")
    assert (single.code, single.out, single.err) == (0, "", "")
    expected = read(tmp_path / "one")
    assert len(expected) == 4
    for number, (tp, pp) in enumerate([(2, 1), (2, 2)]):
        sizes = ("--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp, "--batch-size", 3)
        ranks = server.run_ranks("generate", *how, *sizes, "--output", tmp_path / f"{number}", world_size=tp * pp)
        assert [(rank.code, rank.err) for rank in ranks] == [(0, "")] * (tp * pp)
        for found, wanted in zip(read(tmp_path / f"{number}"), expected, strict=True):
            key = "log_probs" if "log_probs" in wanted else "score"
            assert found.pop(key) == pytest.approx(wanted[key], abs=1e-4)
            assert found == {name: value for name, value in wanted.items() if name != key}


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--input {in}", 64, ["--input and --output"]),
        ("--input {in} --output {in}", 64, ["--output", "exists already"]),
        ("--input {tmp}/none --output {tmp}/out", 65, ["--input", "none"]),
        ("--num-beams 3", 64, ["--num-beams", "--decoding"]),
        ("--max-new-tokens 100000", 64, ["--max-new-tokens 100000", "positions"]),
        ("--tensor-model-parallel-size 3", 64, ["--num-attention-heads", "--tensor-model-parallel-size 3"]),
        ("--tensor-model-parallel-size 2", 64, ["--tensor-model-parallel-size 2"]),
        ("--ckpt-step 7", 66, ["iter_0000007"]),
        ("--tokenizer-model {in}", 65, ["--tokenizer-model"]),
        ("--beams 3", 64, ["--beams", "--num-beams"]),
    ],
)
def test_what_a_user_gets_wrong(
    server: ToolServer, saved: Path, requests: Path, tmp_path: Path, flags: str, code: int, words: list[str]
) -> None:
    given = flags.replace("{in}", str(requests)).replace("{tmp}", str(tmp_path)).split()
    result = server.run("generate", "--load", saved, *given)
    assert result.code == code, result.err
    assert all(word in result.error for word in words), result.error
    assert list(tmp_path.iterdir()) == []
