"""transformers' BART to ours and back; what of METRO is none."""

import pytest
import torch
from transformers import BartForConditionalGeneration

from megatron_metro.config.errors import CheckpointError, ConfigError
from tests.helpers import conversions
from tests.helpers.conversions import make_bart, make_metro


@pytest.mark.parametrize("changes", [{}, {"activation_function": "gelu", "encoder_layers": 1}], ids=["relu", "gelu"])
def test_there_and_back(changes, groups, tmp_path):
    network = make_bart(**changes)
    network.save_pretrained(tmp_path / "theirs")
    ours = conversions.convert_to_ours("hf-bart", tmp_path / "theirs", tmp_path / "ours")
    conversions.assert_same_logits(conversions.load_ours(ours), network, pad_id=1)
    back = BartForConditionalGeneration.from_pretrained(conversions.convert_back("hf-bart", ours, tmp_path / "back"))
    conversions.assert_same_tensors(back.state_dict(), network.state_dict())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale_embedding", True),
        ("decoder_ffn_dim", 36),
        ("activation_function", "silu"),
        ("d_model", "21"),
        ("vocab_size", None),
    ],
)
def test_another_architecture_is_refused(name, value, groups, tmp_path):
    make_bart().save_pretrained(tmp_path / "theirs")
    conversions.change(tmp_path / "theirs", name, value)
    with pytest.raises(CheckpointError, match=name):
        conversions.convert_to_ours("hf-bart", tmp_path / "theirs", tmp_path / "ours")


def test_a_bias_of_logits_is_refused(groups, tmp_path):
    network = make_bart()
    network.final_logits_bias = torch.nn.Buffer(torch.ones(1, conversions.VOCAB_SIZE))
    network.save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="final_logits_bias is not zero"):
        conversions.convert_to_ours("hf-bart", tmp_path / "theirs", tmp_path / "ours")


def test_a_model_with_bias_tables_is_none(groups, tmp_path):
    make_metro().save_pretrained(tmp_path / "theirs")
    ours = conversions.convert_to_ours("hf-metro-t0", tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(ConfigError, match=r"--to hf-bart: .*--relative-attention none, this one has per_layer"):
        conversions.convert_back("hf-bart", ours, tmp_path / "back")
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".back*"))
