"""The command-line tools on a small text, in this process: what they print, write and exit with."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from megatron_metro.config.errors import ConfigError
from megatron_metro.config.objectives import OBJECTIVES, PRETRAINING
from megatron_metro.data.preprocess import PreprocessOptions, preprocess
from tests.helpers.corpus import Corpus, ignore_progress

TOOLS = Path(__file__).parents[3] / "tools"


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Run a tool as a command; its exit code, standard output and standard error."""

    def run(name: str, *flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        code = 0
        try:
            runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_from_text_to_samples(run_tool, corpus: Corpus, tmp_path):
    flags = ("--input", corpus.jsonl, "--vocab-size", 200, "--output-prefix", tmp_path / "tok")
    code, out, _ = run_tool("train_tokenizer", *flags)
    assert (code, out) == (0, f"{tmp_path}/tok.model: 200 pieces\n")
    assert (tmp_path / "tok.model").read_bytes() == corpus.model.read_bytes()
    flags = ("--input", corpus.jsonl, "--output-prefix", tmp_path / "data", "--tokenizer-model", tmp_path / "tok.model")
    code, out, err = run_tool("preprocess_data", *flags, "--workers", 2, "--log-interval", 1, "--partitions", 4)
    assert code == 0
    assert "120 documents" in out
    assert "tokens per CPU second" in out
    assert "tokens/s" in err
    for suffix in ("bin", "idx", "json"):
        ours, expected = Path(f"{tmp_path}/data_text_document.{suffix}"), Path(f"{corpus.prefix}.{suffix}")
        assert ours.read_bytes() == expected.read_bytes()
    flags = ("--data-path", f"{tmp_path}/data_text_document", "--tokenizer-model", tmp_path / "tok.model")
    for objective, num_layers, words in (
        ("metro", 2, ("generator sees", "decoder writes", "<sen000>", "masked:")),
        ("metro", 0, ("encoder reads", "decoder writes", "<sen000>")),
        ("electra", 2, ("generator sees", "encoder writes", "<sen000>", "masked:")),
        ("spactor", 2, ("generator sees", "decoder writes", "<sen001>", "100.0% as <sen000>")),
        ("t5-span", 0, ("decoder writes", "<sen001>", "</s>")),
        *(
            (name, 0, ("encoder reads", "decoder writes"))
            for name in PRETRAINING
            if OBJECTIVES[name].generator == "none"
        ),
    ):
        shape = ("--seq-length", 64, "--split", "80,20,0", "--objective", objective)
        shape += ("--generator-num-layers", num_layers)
        code, out, _ = run_tool("inspect_data", *flags, *shape, "--part", "valid", "--verify")
        assert code == 0
        assert all(word in out for word in (*words, "--- sample 1")), out


def test_from_text_to_samples_with_t5s_ids(run_tool, corpus: Corpus, tmp_path):
    flags = ("--input", corpus.jsonl, "--vocab-size", 200, "--output-prefix", tmp_path / "tok", "--t5")
    assert run_tool("train_tokenizer", *flags)[0] == 0
    model = ("--tokenizer-model", tmp_path / "tok.model", "--vocab-extra-ids", 40)
    output = ("--input", corpus.jsonl, "--output-prefix", tmp_path / "data")
    assert run_tool("preprocess_data", *output, *model)[0] == 0
    shape = ("--data-path", f"{tmp_path}/data_text_document", "--seq-length", 64, "--split", "80,20,0")
    for objective in PRETRAINING:
        code, out, err = run_tool("inspect_data", *model, *shape, "--objective", objective, "--part", "valid")
        assert code == 0, err
        assert ("decoder reads:   <pad> " in out) == (objective != "electra")
        assert ("<extra_id_0>" in out) == (objective in ("t5-span", "t5-metro", "t5-iid", "spactor"))
        masks = ("metro", "electra", "spactor", "bert-style", "mass-style")
        assert ("<extra_id_39>" in out) == (objective in masks), out


def test_pairs_are_shown_as_they_are_read(run_tool, corpus: Corpus, tmp_path):
    lines = [{"source": text.split()[0], "target": text.split()[-1]} for text in corpus.texts]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--data-path", tmp_path / "pairs.jsonl", "--tokenizer-model", corpus.model, "--generator-num-layers", 0)
    shape = "--objective text-to-text --seq-length 64 --decoder-seq-length 48 --pack-examples --verify"
    code, out, err = run_tool("inspect_data", *flags, *shape.split())
    assert code == 0, err
    assert "116 examples in" in out and "are padding" in out
    assert out.count("decoder reads:   </s> ") == 2 and out.count("encoder reads:   <s> ") == 2


def test_errors_end_tools_with_one_line_and_their_code(run_tool, corpus: Corpus, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\nnot json\n')
    model = ("--tokenizer-model", corpus.model)
    cases = (
        (65, "preprocess_data", "--input", bad, "--output-prefix", tmp_path / "out", *model),
        (65, "preprocess_data", "--input", tmp_path / "absent", "--output-prefix", tmp_path / "out", *model),
        (64, "preprocess_data", "--input", corpus.jsonl, "--output-prefix", tmp_path / "out"),
        (74, "preprocess_data", "--input", corpus.jsonl, "--output-prefix", bad / "out", *model),
        (64, "train_tokenizer", "--input", corpus.jsonl, "--vocab-size", 10**6, "--output-prefix", tmp_path / "out"),
        (65, "inspect_data", "--data-path", tmp_path / "absent", *model),
    )
    for code, *command in cases:
        found, out, err = run_tool(*command)
        assert (found, out) == (code, ""), command
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [bad]
    code, _, err = run_tool(*cases[0][1:], "--on-error", "skip")
    assert code == 0
    assert f"skipped: {bad}:2 is not JSON" in err


def test_manifest_says_what_made_the_data(corpus: Corpus):
    manifest = json.loads(Path(f"{corpus.prefix}.json").read_text())
    assert manifest["tokenizer_sha256"] == corpus.tokenizer.sha256
    assert (manifest["num_pieces"], manifest["num_documents"], manifest["dtype"]) == (200, 120, "uint16")


def test_options_are_checked(corpus: Corpus, tmp_path):
    for options, message in (({"num_workers": 0}, "--workers is 0"), ({"json_keys": ("a", "a")}, "--json-keys a a")):
        options = PreprocessOptions(inputs=(str(corpus.jsonl),), output_prefix=f"{tmp_path}/out", **options)
        with pytest.raises(ConfigError, match=message):
            preprocess(options, corpus.tokenizer, ignore_progress)
