"""tools/convert_checkpoint.py: what it says, how it ends, and that nothing half-made has a name."""

import runpy
import shutil
import sys

import pytest
import torch

from tests.helpers import conversions, hostile_models, stored_run
from tests.helpers.repository import ROOT

NAMES = [case.name for case in hostile_models.list_bad_folders("true")]
SENTINELS = ("--vocab-extra-ids", str(conversions.NUM_SENTINELS))


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("t5") / "theirs"
    conversions.make_t5().save_pretrained(folder)
    return folder


def run_tool(capsys, *words):
    """Exit code, standard output, standard error."""
    argv, sys.argv = sys.argv, ["convert_checkpoint.py", *map(str, words)]
    try:
        runpy.run_path(str(ROOT / "tools" / "convert_checkpoint.py"), run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv = argv
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def list_words(source, target, folder, output, *more):
    return ["--from", source, "--to", target, "--input", folder, "--output", output, *more]


def test_there_and_back_with_logits(t5_folder, groups, tmp_path, capsys):
    words = list_words("hf-t5", "megatron", t5_folder, tmp_path / "ours", "--check-logits", 2, *SENTINELS)
    code, out, _ = run_tool(capsys, *words)
    assert code == 0 and f"{tmp_path / 'ours'}: 37 weights, read again and equal; logits of 2 inputs differ by" in out
    words = list_words("megatron", "hf-t5", tmp_path / "ours", tmp_path / "back", "--check-logits", 1)
    code, out, _ = run_tool(capsys, *words)
    assert code == 0 and out.count("\n") == 1 and "logits of 1 inputs" in out
    assert run_tool(capsys, "verify", tmp_path / "ours")[0] == 0
    code, out, _ = run_tool(capsys, "inspect", tmp_path / "ours")
    assert code == 0 and "word_embeddings.weight" in out and "converted from hf-t5" in out


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_a_bad_folder_is_refused(number, t5_folder, tmp_path, capsys):
    canary = tmp_path / "canary"
    case = hostile_models.list_bad_folders(f"touch {canary}")[number]
    folder = tmp_path / "theirs"
    shutil.copytree(t5_folder, folder)
    case.damage(folder)
    code, out, err = run_tool(capsys, *list_words("hf-t5", "megatron", folder, tmp_path / "ours", *SENTINELS))
    assert code == case.code and case.words in err, err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.isascii()
    assert "\x1b" not in err and len(err) < 1500
    assert out == "" and sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--from", "gpt2"], 64, "--from: invalid choice: 'gpt2'"),
        (["--to", "fairseq"], 64, "--to: invalid choice: 'fairseq'"),
        (["--output"], 64, "--output"),
        (["--check-logits", "0"], 64, "--check-logits: 0 is not in"),
        (["--num-atention-heads", "4"], 64, "the nearest is --num-attention-heads"),
        (["--preset", "t5-small"], 64, "--preset t5-small describes a whole run"),
        (["--step", "3"], 64, "--step 3 names an iteration of --from megatron"),
        (["--num-attention-heads", "5"], 66, "has shape [8, 3], its configuration says [8, 5]"),
        (["--vocab-size", "400"], 66, "shared.weight has shape"),
        (["--tokenizer-model", "gone.model"], 65, "gone.model cannot be read"),
        (["--input", "gone"], 66, "--input gone: is no folder"),
        (["--output", "taken"], 66, "taken: holds a checkpoint already"),
    ],
)  # fmt: skip
def test_a_bad_command_is_refused(words, code, message, t5_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken" / "release").mkdir(parents=True)
    given = {"--from": "hf-t5", "--to": "megatron", "--input": t5_folder, "--output": "ours"}
    given |= dict([words if len(words) == 2 else (words[0], "")])
    found, _, err = run_tool(capsys, *(word for pair in given.items() for word in pair), *SENTINELS)
    assert found == code and message in err and err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_an_existing_folder_is_left_alone(t5_folder, tmp_path, capsys):
    conversions.convert_to_ours("hf-t5", t5_folder, tmp_path / "ours")
    (tmp_path / "back").mkdir()
    code, _, err = run_tool(capsys, *list_words("megatron", "hf-t5", tmp_path / "ours", tmp_path / "back"))
    assert code == 66 and "exists already and is never overwritten" in err
    assert not list((tmp_path / "back").iterdir())


@pytest.mark.parametrize(("source", "target"), [("hf-t5", "megatron"), ("megatron", "hf-t5")])
def test_a_full_disk_leaves_nothing(source, target, t5_folder, tmp_path, capsys, monkeypatch):
    folder = t5_folder
    if source == "megatron":
        folder = conversions.convert_to_ours("hf-t5", t5_folder, tmp_path / "ours")
    before = sorted(tmp_path.iterdir())

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_metro.config.files.os.fsync", refuse)
    code, _, err = run_tool(capsys, *list_words(source, target, folder, tmp_path / "new", *SENTINELS))
    assert code == 74 and "No space left on device" in err and sorted(tmp_path.iterdir()) == before, err


def test_what_was_written_is_read_again(t5_folder, tmp_path, capsys, monkeypatch):
    """A disk that gives back other bytes is found out before the output has its name."""
    from megatron_metro.conversion.tensor_files import SafetensorsFile

    ours = conversions.convert_to_ours("hf-t5", t5_folder, tmp_path / "ours")
    read = SafetensorsFile.read
    monkeypatch.setattr(SafetensorsFile, "read", lambda self, name: read(self, name) + ("wo" in name) * 1e-3)
    code, _, err = run_tool(capsys, *list_words("megatron", "hf-t5", ours, tmp_path / "back"))
    assert code == 66 and "is not what was written" in err
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_configuration_that_says_something_else_is_found(t5_folder, tmp_path, capsys, monkeypatch):
    import dataclasses

    from megatron_metro.conversion import convert, hf_t5

    forgetful = dataclasses.replace(
        hf_t5.FORMAT, write_config=lambda run: {**hf_t5.write_config(run), "relative_attention_max_distance": 128}
    )
    monkeypatch.setitem(convert.FOREIGN, "hf-t5", forgetful)
    ours = conversions.convert_to_ours("hf-t5", t5_folder, tmp_path / "ours")
    code, _, err = run_tool(capsys, *list_words("megatron", "hf-t5", ours, tmp_path / "back"))
    assert code == 66 and "says relative_attention_max_distance 128 where 19 was written" in err
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_wrong_logits_leave_nothing(t5_folder, groups, tmp_path, capsys, monkeypatch):
    """A name table that swaps two weights passes its own round trip; logits tell."""
    import dataclasses

    from megatron_metro.conversion import convert, hf_t5

    def swap(model):
        rules = hf_t5.name_weights(model)
        fused = [rule for rule in rules if rule.ours.endswith("linear_kv.weight")]
        return [dataclasses.replace(rule, theirs=rule.theirs[::-1]) if rule in fused else rule for rule in rules]

    monkeypatch.setitem(convert.FOREIGN, "hf-t5", dataclasses.replace(hf_t5.FORMAT, name_weights=swap))
    ours = conversions.convert_to_ours("hf-t5", t5_folder, tmp_path / "ours")
    words = list_words("megatron", "hf-t5", ours, tmp_path / "back", "--check-logits", 1)
    code, _, err = run_tool(capsys, *words)
    assert code == 66 and "--check-logits: logits of 1 inputs differ by" in err
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_damaged_step_is_refused(groups, tmp_path, capsys):
    stored = stored_run.save_run(tmp_path / "run", groups)
    shard = stored.step / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, _, err = run_tool(capsys, *list_words("megatron", "hf-metro-t0", stored.folder, tmp_path / "back"))
    assert code == 66 and "__0_0.distcp: is damaged" in err
    code, _, err = run_tool(
        capsys, *list_words("megatron", "hf-metro-t0", stored.folder, tmp_path / "back", "--step", 9)
    )
    assert code == 66 and "choose one with --step" in err and not (tmp_path / "back").exists()
