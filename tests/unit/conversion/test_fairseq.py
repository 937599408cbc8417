"""METRO's own checkpoints: names of reference section 8.3, generator and RTD head included; nothing of ours is asked.

The file is made from weights of our names by a table of its own, and what was imported is compared with a restatement
of METRO in plain PyTorch.
"""

import logging
import re
from dataclasses import replace

import pytest
import torch

from megatron_metro.config.errors import CheckpointError, UnsafeError
from megatron_metro.config.schema import ObjectiveConfig
from megatron_metro.conversion.convert import Conversion, convert
from megatron_metro.conversion.logits import LogitCheck, rename_to_hf
from megatron_metro.conversion.whole_model import load_model
from megatron_metro.tokenizer import NullTokenizer
from tests.helpers import conversions, hostile, tiny
from tests.helpers.fairseq_file import SIZES, make_weights, name_as_fairseq, save
from tests.helpers.reference import ReferenceMetro

MODELS = {
    "base": {},
    "base++": {"generator_embedding_sharing": "token_pos_norm"},
    "simple head": {"rtd_head": "simple"},
    "T5 control": {"generator_num_layers": 0, "rtd_head": "none"},
}


def describe(model):
    """What the tensors say of a model, and the distance that was given."""
    free = ("hidden_dropout", "attention_dropout", "generator_ffn_hidden_size")
    return replace(model, **{name: getattr(tiny.tiny_model(), name) for name in free})


def convert_file(path, output, target="megatron", check=None, **settings):
    changes = {"vocab_extra_ids": 40, "relative_attention_max_distance": 12, **settings}
    convert(Conversion(source="fairseq", target=target, input=path, output=output, settings=changes), check)
    return output


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_comes_along(name, groups, tmp_path):
    model = tiny.tiny_model(**{**SIZES, **MODELS[name]})
    weights = make_weights(model)
    save(tmp_path / "checkpoint_last.pt", model, weights)
    check = LogitCheck(2)
    ours = convert_file(tmp_path, tmp_path / "ours", check=check)  # the folder, as fairseq leaves it
    assert check.report.startswith("; logits of 2 inputs differ by")
    piece = load_model(ours, tokenizer=NullTokenizer(260, 40), device="cpu")
    found = {name: weight.detach() for name, weight in piece.named_parameters()}
    found |= {
        name: weight[:300] for name, weight in found.items() if name in weights and len(weight) > len(weights[name])
    }
    conversions.assert_same_tensors(found, weights)
    assert describe(piece.context.model) == describe(model)
    # The configuration that was found makes METRO of it.
    batch = tiny.metro_batch(3, seed=5) if model.has_generator else tiny.span_batch(3, seed=5)
    expected = ReferenceMetro(weights, model).run([batch], ObjectiveConfig()).log
    assert ReferenceMetro(found, piece.context.model).run([batch], ObjectiveConfig()).log == expected


def test_fairseq_to_metro_t0_in_one_step(groups, tmp_path, caplog):
    model = tiny.tiny_model(**SIZES)
    save(tmp_path / "run.pt", model, make_weights(model))
    with caplog.at_level(logging.WARNING):
        convert_file(tmp_path / "run.pt", tmp_path / "released", target="hf-metro-t0")
    assert "generator, mlm_head, rtd_head" in caplog.text
    from transformers import AutoModelForSeq2SeqLM

    import megatron_metro.conversion.hf

    assert megatron_metro.conversion.hf
    network = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "released")
    state = torch.load(tmp_path / "run.pt", weights_only=True)["model"]
    main = {name: tensor for name, tensor in state.items() if name.startswith(("encoder.", "decoder."))}
    renamed = {rename_to_hf(name): tensor for name, tensor in main.items() if "version" not in name}
    renamed["shared.weight"] = state["encoder.embed_tokens.weight"]
    conversions.assert_same_tensors(network.state_dict(), renamed)


@pytest.mark.parametrize(("num_buckets", "given", "distance"), [(32, None, 128), (128, None, 256), (128, 128, 128)])
def test_the_distance_is_the_trained_one(num_buckets, given, distance, groups, tmp_path, caplog):
    model = tiny.tiny_model(**SIZES, relative_attention_num_buckets=num_buckets)
    save(tmp_path / "run.pt", model, make_weights(model))
    settings = {"vocab_extra_ids": 40} | ({"relative_attention_max_distance": given} if given else {})
    paths = {"input": tmp_path / "run.pt", "output": tmp_path / "ours"}
    with caplog.at_level(logging.WARNING):
        convert(Conversion(source="fairseq", target="megatron", **paths, settings=settings))
    found = load_model(tmp_path / "ours", tokenizer=NullTokenizer(260, 40), device="cpu").context.model
    assert found.relative_attention_max_distance == distance
    assert ("256" in caplog.text) == (num_buckets == 128)


def test_what_a_file_may_not_hold(groups, tmp_path):
    model = tiny.tiny_model(**SIZES)
    weights = make_weights(model)
    state = name_as_fairseq(model, weights)
    for change, words in (
        ({"encoder.layers.1.fc1.bias": None}, r"lacks encoder\.layers\.1\.fc1\.bias"),
        ({"decoder.layers.0.extra": torch.ones(2)}, r"holds decoder\.layers\.0\.extra \(1 such"),
        ({"encoder.layers.1.fc1.bias": torch.ones(3)}, r"fc1\.bias has shape \[3\]"),
        ({"encoder.layers.1.fc1.bias": torch.full((32,), torch.nan)}, "not finite"),
        ({"decoder.embed_tokens.weight": torch.ones(300, 16)}, r"decoder\.embed_tokens\.weight is not"),
        ({"encoder.layers.1.fc1.bias": torch.ones(32, dtype=torch.int64)}, "is of torch.int64"),
    ):
        changed = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
        torch.save({"model": changed}, tmp_path / "run.pt")
        with pytest.raises(CheckpointError, match=words):
            convert_file(tmp_path / "run.pt", tmp_path / "ours")
        assert not (tmp_path / "ours").exists()


def test_a_hostile_file_runs_nothing(groups, tmp_path):
    canary = tmp_path / "canary"
    payloads = hostile.payloads(f"touch {canary}")
    for content, words in payloads.values():
        (tmp_path / "run.pt").write_bytes(content)
        names = words if b"torch\nSize" not in content else "torch.Size"
        with pytest.raises(UnsafeError, match=re.escape(f"refers to '{names}'")):
            convert_file(tmp_path / "run.pt", tmp_path / "ours")
    hidden = hostile.make_call(f"touch {canary}")
    torch.save({"model": {"a": torch.ones(2)}, "cfg": hidden}, tmp_path / "run.pt")
    with pytest.raises(UnsafeError, match=r"run\.pt: refers to 'posix\.system'"):
        convert_file(tmp_path / "run.pt", tmp_path / "ours")
    assert not canary.exists()
