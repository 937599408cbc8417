"""The released METRO-T0 format: names, shapes and counts, the registered classes, there and back, its tokenizer."""

import ast
import json
import logging
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

import megatron_metro.conversion.hf  # noqa: F401 (importing it registers METRO)
from megatron_metro.config.errors import CheckpointError, ConfigError, DataError
from megatron_metro.config.presets import PRESETS
from megatron_metro.conversion.convert import keep_main_model
from megatron_metro.conversion.fairseq_t5 import FairseqT5Config, FairseqT5ForConditionalGeneration
from megatron_metro.conversion.hf_metro_t0 import name_weights, write_config
from megatron_metro.data.vocabulary_training import VocabularyOptions, train_vocabulary, write_vocabulary
from megatron_metro.model.weights import weight_shapes
from tests.helpers import conversions
from tests.helpers.conversions import make_metro
from tests.helpers.reference import ReferenceMetro
from tests.helpers.repository import PACKAGE, list_names, parse, relative

# Reference sections 1.9 and 8.2: tensors in the state dictionary, the four names of the token matrix included, and
# parameters of the main model.
RELEASED = {
    "metro-base": (526, 225_618_432),
    "metro-base++": (526, 249_604_608),
    "metro-large++": (1042, 773_644_288),
}
TEXTS = ["(hello). It's   U.S.A.!", "the quick brown fox", "", "</s> <sen000> [MASK]", "don\u2019t\nstop ☃"]


def main_run(preset):
    run = PRESETS[preset]()
    return replace(run, model=replace(run.model, generator_num_layers=0, rtd_head="none"))


@pytest.mark.parametrize("preset", RELEASED)
def test_names_shapes_and_counts_are_the_released_ones(preset):
    run = main_run(preset)
    model, (num_tensors, num_parameters) = run.model, RELEASED[preset]
    shapes = weight_shapes(model)
    rules = name_weights(model)
    written = {name: shape for rule in rules for name, shape in rule.list_parts(shapes[rule.ours]).items()}
    copies = [name for rule in rules for name in rule.copies]
    assert len(written) + len(copies) == num_tensors
    assert sum(torch.Size(shape).numel() for shape in written.values()) == num_parameters
    d, f, v = model.hidden_size, model.ffn_hidden_size, model.vocab_size
    expected = {
        "shared.weight": (v, d),
        "encoder.pos_embed.weight": (1026, d),
        "decoder.first_layer_norm.bias": (d,),
        "encoder.block.11.layer.0.SelfAttention.q.weight": (d, d),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
            model.relative_attention_num_buckets,
            model.num_attention_heads,
        ),
        "encoder.block.3.layer.1.DenseReluDense.wi.bias": (f,),
        "decoder.block.3.layer.2.DenseReluDense.wo.weight": (d, f),
        "decoder.block.11.layer.1.EncDecAttention.o.bias": (d,),
        "decoder.block.0.layer.2.layer_norm.weight": (d,),
    }
    assert {name: written[name] for name in expected} == expected
    with torch.device("meta"):
        network = FairseqT5ForConditionalGeneration(FairseqT5Config(**write_config(run)))
    state = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert state == written | dict.fromkeys(copies, (v, d))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_there_and_back(form, groups, tmp_path):
    network = make_metro()
    if form == "safetensors":
        network.save_pretrained(tmp_path / "theirs")
    else:
        network.config.save_pretrained(tmp_path / "theirs")
        torch.save(network.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    conversions.change(tmp_path / "theirs", "auto_map", {"AutoConfig": "remote.NoSuchClass"})
    ours = conversions.convert_to_ours("hf-metro-t0", tmp_path / "theirs", tmp_path / "ours")
    conversions.assert_same_logits(conversions.load_ours(ours), network, pad_id=1)
    back = conversions.convert_back("hf-metro-t0", ours, tmp_path / "back")
    assert "auto_map" not in json.loads((back / "config.json").read_text())
    loaded = AutoModelForSeq2SeqLM.from_pretrained(back, trust_remote_code=False)
    assert type(loaded) is FairseqT5ForConditionalGeneration
    conversions.assert_same_tensors(loaded.state_dict(), network.state_dict())
    assert (loaded.config.decoder_start_token_id, loaded.generation_config.eos_token_id) == (2, 2)


@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "padded"])
def test_the_registered_model_is_metro(is_padded, groups, tmp_path):
    """Against a restatement of METRO in plain PyTorch; the large models' finer buckets too."""
    network = make_metro(relative_attention_num_buckets=16, relative_attention_max_distance=15)
    network.save_pretrained(tmp_path / "theirs")
    piece = conversions.load_ours(conversions.convert_to_ours("hf-metro-t0", tmp_path / "theirs", tmp_path / "ours"))
    reference = ReferenceMetro({n: w.detach() for n, w in piece.named_parameters()}, piece.context.model)
    tokens, padding, decoder_tokens = conversions.make_inputs(is_padded=is_padded, pad_id=1)
    memory = reference.encode("encoder", tokens, padding)
    expected = reference.project(reference.decode(decoder_tokens, None, memory, padding))
    found = conversions.compute_theirs(network, tokens, padding, decoder_tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_with_a_cache_is_generation_without(options):
    network = make_metro(num_layers=1, num_decoder_layers=3)
    tokens, padding, _ = conversions.make_inputs(is_padded=True, pad_id=1)
    call = {
        "attention_mask": (~padding).long(),
        "min_new_tokens": 8,
        "max_new_tokens": 12,
        "do_sample": False,
        **options,
    }
    written = [network.generate(tokens, **call, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*written) and written[0].shape[1] > 3


def test_loss_and_shifted_targets():
    network = make_metro()
    tokens, _, labels = conversions.make_inputs(is_padded=False, pad_id=1)
    labels[0, 5:] = -100
    output = network(input_ids=tokens, labels=labels)
    start = torch.full((3, 1), 2)
    shifted = torch.cat([start, labels[:, :-1]], dim=1)
    logits = network(input_ids=tokens, decoder_input_ids=shifted.where(shifted >= 0, 1)).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)


def test_the_published_distance_is_a_stated_choice(groups, tmp_path, caplog):
    """The large models' configuration says 128, with which they were scored; they were trained with 256."""
    make_metro(relative_attention_num_buckets=128, relative_attention_max_distance=128).save_pretrained(
        tmp_path / "theirs"
    )
    distances = []
    for number, settings in enumerate([{}, {"relative_attention_max_distance": 256}]):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            ours = conversions.convert_to_ours("hf-metro-t0", tmp_path / "theirs", tmp_path / str(number), **settings)
        assert "--relative-attention-max-distance" in caplog.text and "256" in caplog.text
        distances.append(conversions.load_ours(ours).context.model.relative_attention_max_distance)
        back = conversions.convert_back("hf-metro-t0", ours, tmp_path / f"back {number}")
        assert AutoConfig.from_pretrained(back).relative_attention_max_distance == distances[-1]
    assert distances == [128, 256]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A small SentencePiece model of METRO's kind, and another."""
    folder = tmp_path_factory.mktemp("vocabulary")
    words = [f"{start}{end}" for start in ("qu", "br", "st", "h", "f") for end in ("ick", "own", "op", "ello", "ox")]
    (folder / "text.txt").write_text((" ".join(words) + " the ( over ) it's don't . !\n") * 50)
    paths = []
    for size in (40, 41):
        model = train_vocabulary(VocabularyOptions(inputs=(str(folder / "text.txt"),), vocab_size=size))
        paths.append(write_vocabulary(model, str(folder / str(size)))[0])
    return paths


def import_with_tokenizer(tmp_path, path, **settings):
    make_metro(vocab_size=40 + 20).save_pretrained(tmp_path / "theirs")
    tokenizer = {"tokenizer_model": str(path), "vocab_extra_ids": 20, "pre_tokenizer": "metro-lower"}
    return conversions.convert_to_ours("hf-metro-t0", tmp_path / "theirs", tmp_path / "ours", **tokenizer, **settings)


def test_tokenizers_go_along(vocabulary, groups, tmp_path):
    from megatron_metro.conversion.whole_model import load_model
    from megatron_metro.tokenizer import Tokenizer

    ours = import_with_tokenizer(tmp_path, vocabulary[0])
    assert load_model(ours, device="cpu").context.model.vocab_size == 60  # with the tokenizer that lies beside it
    back = conversions.convert_back("hf-metro-t0", ours, tmp_path / "back")
    theirs = AutoTokenizer.from_pretrained(back, trust_remote_code=False)
    tokenizer = Tokenizer.load(vocabulary[0], 20, "metro-lower")
    assert (len(theirs), theirs.vocab_size, theirs.pad_token_id) == (60, 60, 1)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ids == [0, *tokenizer.encode(text), 2], text
    assert theirs(TEXTS[0], TEXTS[1])["input_ids"] == [
        *(0, *tokenizer.encode(TEXTS[0]), 2),
        *(2, *tokenizer.encode(TEXTS[1]), 2),
    ]
    assert theirs.decode(theirs("the quick fox")["input_ids"], skip_special_tokens=True) == "the quick fox"
    again = theirs.save_pretrained(tmp_path / "again")
    assert (
        again
        and AutoTokenizer.from_pretrained(tmp_path / "again")("the fox")["input_ids"] == theirs("the fox")["input_ids"]
    )
    # What was exported is imported with its own tokenizer.
    conversions.convert_to_ours("hf-metro-t0", back, tmp_path / "second", vocab_extra_ids=20)
    lines = (back / "dict.txt").read_text().splitlines()
    (back / "dict.txt").write_text("\n".join([*lines[:7], lines[8], lines[7], *lines[9:]]) + "\n")
    with pytest.raises(DataError, match=r"dict\.txt, line 8"):
        conversions.convert_to_ours("hf-metro-t0", back, tmp_path / "third", vocab_extra_ids=20)


def test_another_tokenizer_is_refused(vocabulary, groups, tmp_path):
    with pytest.raises(ConfigError, match="--vocab-size 60 is not the tokenizer's 61"):
        import_with_tokenizer(tmp_path, vocabulary[1])
    ours = import_with_tokenizer(tmp_path, vocabulary[0])
    back = conversions.convert_back("hf-metro-t0", ours, tmp_path / "back")
    settings = {"tokenizer_model": str(vocabulary[0]), "vocab_extra_ids": 20, "pre_tokenizer": "none"}
    with pytest.raises(ConfigError, match=r"--pre-tokenizer none has checksum"):
        conversions.convert_to_ours("hf-metro-t0", back, tmp_path / "other", **settings)
    assert not (tmp_path / "other").exists()


def test_the_generator_stays_at_home(groups, tmp_path, caplog):
    from megatron_metro.conversion.convert import open_source
    from tests.helpers import stored_run

    stored = stored_run.save_run(tmp_path / "run", groups)
    with caplog.at_level(logging.WARNING):
        back = conversions.convert_back("hf-metro-t0", stored.folder, tmp_path / "back")
    assert "leaves out" in caplog.text and "generator, mlm_head, rtd_head" in caplog.text
    source = keep_main_model(open_source("megatron", stored.folder, None, {}), "hf-metro-t0")
    weights = stored.weights()
    network = AutoModelForSeq2SeqLM.from_pretrained(back)
    assert torch.equal(network.shared.weight, weights["word_embeddings.weight"][:300])
    for name in source.weights.names():
        assert torch.equal(source.weights.read(name), weights[name][:300] if name.startswith("word") else weights[name])


def test_a_run_that_goes_on_may_be_read(groups, tmp_path):
    """The folder's lock, a half-written step and a newer tracker are no hindrance; nothing of it is touched."""
    from megatron_metro.checkpoint.lock import SaveLock
    from tests.helpers import stored_run

    stored = stored_run.save_run(tmp_path / "run", groups)
    lock = SaveLock(stored.folder)
    lock.acquire()
    (stored.folder / "iter_0000004.xyz.partial").mkdir()
    before = sorted(path.name for path in stored.folder.rglob("*"))
    conversions.convert_back("hf-metro-t0", stored.folder, tmp_path / "back")
    assert sorted(path.name for path in stored.folder.rglob("*")) == before
    lock.close()


def test_transformers_is_imported_by_its_own_modules_alone():
    """Importing anything else, training and conversion without --check-logits, needs no transformers."""
    files = {"fairseq_t5.py", "fairseq_tokenizer.py", "hf.py"}
    importing = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "transformers" for name, _ in list_names(parse(path)))
    }
    assert importing == files
    modules = {f"megatron_metro.conversion.{name.removesuffix('.py')}" for name in files}
    for path in PACKAGE.rglob("*.py"):
        top_level = [node for node in parse(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {node.module for node in top_level if isinstance(node, ast.ImportFrom)}
        assert path.name in files or not names & modules, relative(path)


def test_a_position_table_says_how_many_positions_there_are(groups, tmp_path):
    make_metro().save_pretrained(tmp_path / "theirs")
    conversions.change(tmp_path / "theirs", "max_positions", 1024)  # as in every release, whatever the table
    ours = conversions.convert_to_ours("hf-metro-t0", tmp_path / "theirs", tmp_path / "ours")
    assert conversions.load_ours(ours).context.model.max_position_embeddings == 37
    conversions.change(tmp_path / "theirs", "model_type", "t5")
    with pytest.raises(CheckpointError, match="model_type is 't5', not fairseq_t5"):
        conversions.convert_to_ours("hf-metro-t0", tmp_path / "theirs", tmp_path / "again")
