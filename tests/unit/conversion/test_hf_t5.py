"""transformers' T5 to ours and back: bits, logits, and the forms in which its weights are found."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from megatron_metro.config.errors import CheckpointError, MetroError
from megatron_metro.conversion.whole_model import load_model
from megatron_metro.data.vocabulary_training import VocabularyOptions, train_vocabulary, write_vocabulary
from megatron_metro.tokenizer import Tokenizer
from tests.helpers import conversions
from tests.helpers.conversions import T5_MODELS, make_t5

TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("name", T5_MODELS)
def test_there_and_back(name, groups, tmp_path):
    network = make_t5(**T5_MODELS[name])
    network.save_pretrained(tmp_path / "theirs")
    ours = conversions.convert_to_ours("hf-t5", tmp_path / "theirs", tmp_path / "ours")
    conversions.assert_same_logits(conversions.load_ours(ours), network, pad_id=0)
    back = T5ForConditionalGeneration.from_pretrained(conversions.convert_back("hf-t5", ours, tmp_path / "back"))
    conversions.assert_same_tensors(back.state_dict(), network.state_dict())
    inputs = conversions.make_inputs(is_padded=True, pad_id=0)
    again, expected = (conversions.compute_theirs(side, *inputs) for side in (back.eval(), network))
    assert torch.equal(again, expected)


def save_as_bin(network, folder, num_files=1):
    """As transformers saved before safetensors: every name of a tied matrix, in one storage; maybe cut in files."""
    network.config.save_pretrained(folder)
    state = network.state_dict()
    if num_files == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    places = {name: f"pytorch_model-{number % num_files + 1:05d}.bin" for number, name in enumerate(state)}
    for file in set(places.values()):
        torch.save({name: state[name] for name in state if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("num_files", [1, 3])
def test_weights_only_bin_files(num_files, groups, tmp_path):
    network = make_t5()
    save_as_bin(network, tmp_path / "theirs", num_files)
    ours = conversions.convert_to_ours("hf-t5", tmp_path / "theirs", tmp_path / "ours")
    conversions.assert_same_logits(conversions.load_ours(ours), network, pad_id=0)


def test_parameters_views_and_transposed_storage_are_read(groups, tmp_path):
    """T5's first files were made from TensorFlow's transposed matrices."""
    network = make_t5()
    (tmp_path / "theirs").mkdir()
    network.config.save_pretrained(tmp_path / "theirs")
    state = {
        name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
        for name, tensor in network.state_dict().items()
    }
    row = torch.cat([state["encoder.final_layer_norm.weight"], torch.ones(7)])
    state["encoder.final_layer_norm.weight"] = torch.nn.Parameter(row[:22])
    torch.save(state, tmp_path / "theirs" / "pytorch_model.bin")
    ours = conversions.convert_to_ours("hf-t5", tmp_path / "theirs", tmp_path / "ours")
    back = conversions.convert_back("hf-t5", ours, tmp_path / "back")
    conversions.assert_same_tensors(T5ForConditionalGeneration.from_pretrained(back).state_dict(), network.state_dict())


def test_shards_are_written_and_read(groups, tmp_path, monkeypatch):
    network = make_t5()
    network.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    ours = conversions.convert_to_ours("hf-t5", tmp_path / "theirs", tmp_path / "ours")
    monkeypatch.setattr("megatron_metro.conversion.tensor_files.MAX_SHARD_BYTES", 20_000)
    back = conversions.convert_back("hf-t5", ours, tmp_path / "back")
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 2
    conversions.assert_same_tensors(T5ForConditionalGeneration.from_pretrained(back).state_dict(), network.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays(dtype, groups, tmp_path):
    network = make_t5().to(dtype)
    network.save_pretrained(tmp_path / "theirs")
    ours = conversions.convert_to_ours("hf-t5", tmp_path / "theirs", tmp_path / "ours")
    back = conversions.convert_back("hf-t5", ours, tmp_path / "back")
    found = T5ForConditionalGeneration.from_pretrained(back, dtype=dtype)
    conversions.assert_same_tensors(found.to(dtype).state_dict(), network.state_dict())
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_a_tied_matrix_that_differs_is_refused(groups, tmp_path):
    network = make_t5()
    network.config.save_pretrained(tmp_path / "theirs")
    state = network.state_dict()
    state[TIED[1]] = state[TIED[1]] + 1
    torch.save(state, tmp_path / "theirs" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"decoder\.embed_tokens\.weight is not shared\.weight"):
        conversions.convert_to_ours("hf-t5", tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_the_tokenizer_of_t5_goes_along(groups, tmp_path):
    """With fewer ids than the model has rows, as in every released T5."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog .\n" * 50)
    model = train_vocabulary(VocabularyOptions(inputs=(str(tmp_path / "text.txt"),), vocab_size=32, is_t5=True))
    path, num_pieces = write_vocabulary(model, str(tmp_path / "own"))
    network = make_t5(vocab_size=128)
    network.save_pretrained(tmp_path / "theirs")
    shutil.copy(path, tmp_path / "theirs" / "spiece.model")
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 30}))
    ours = conversions.convert_to_ours("hf-t5", tmp_path / "theirs", tmp_path / "ours", vocab_extra_ids=30)
    piece = load_model(ours, device="cpu")
    assert piece.context.pad_id == 0 and (ours / "tokenizer.model").read_bytes() == model
    back = conversions.convert_back("hf-t5", ours, tmp_path / "back")
    theirs = AutoTokenizer.from_pretrained(back)
    tokenizer = Tokenizer.load(path, 30)
    for text in ("the quick fox", "  lazy   dog.", "a jumps b"):
        assert theirs(text)["input_ids"] == [*tokenizer.encode(text), 1], text
    assert theirs.convert_tokens_to_ids("<extra_id_0>") == tokenizer.sentinel_ids[0] == num_pieces + 29
    (ours / "tokenizer.model").write_bytes(model + b"\0")
    with pytest.raises(MetroError, match="tokenizer"):
        conversions.convert_back("hf-t5", ours, tmp_path / "other")
