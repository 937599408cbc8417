"""METRO's pre-tokeniser: the reference's examples, and what text may become."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_metro.config.errors import DataError
from megatron_metro.config.schema import TokenizerConfig
from megatron_metro.data.indexed import open_store
from megatron_metro.data.manifest import read_manifest
from megatron_metro.data.preprocess import PreprocessOptions, preprocess
from megatron_metro.data.vocabulary_training import VocabularyOptions, train_vocabulary, write_vocabulary
from megatron_metro.pre_tokenizer import pre_tokenize
from megatron_metro.tokenizer import Tokenizer, load_tokenizer
from megatron_metro.training.identity import _compare_tokenizers

EXAMPLES = {
    "(hello).": "( hello ).",
    "U.S.A.": "U.S.A .",
    "$5.00!": "$ 5.00 !",
    "foo--bar": "foo--bar",
    "don't": "don't",
    "  a\tb\n\nc ": "a b c",
    "...": "...",
    "!": "!",
    "``quoted''": '" quoted "',
    "\u201cit\u2019s\u201d": '" it\'s "',
    "\u2014 and \u2013": "- and -",
    "the dogs' s": "the dogs 's",
    "he 'll 's 've 're 't": "he 'll 's 've 're 't",
    "WE 'LL GO": "WE 'LL GO",
    "' something": "' something",
    "": "",
    "\u3001x\u3002": "\u3001 x \u3002",
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples(text):
    assert pre_tokenize(text, lowers=False) == EXAMPLES[text]
    assert pre_tokenize(text, lowers=True) == EXAMPLES[text].lower()


@given(text=st.text(alphabet=st.sampled_from("ab 'sl.,($\n\u2019\u201c-"), max_size=20))
@settings(max_examples=200, deadline=None)
def test_only_blanks_come_and_go(text):
    found = pre_tokenize(text, lowers=False)
    plain = re.sub("``|''", '"', text.strip()).replace("\u2019", "'").replace("\u201c", '"')
    assert found.replace(" ", "") == "".join(plain.split())
    assert found == " ".join(found.split())


KINDS = ("none", "metro", "metro-lower")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """One SentencePiece model behind each pre-tokeniser."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text("the quick brown fox ( jumps ) over it 's lazy dog .\n" * 50)
    model = train_vocabulary(VocabularyOptions(inputs=(str(folder / "text.txt"),), vocab_size=36))
    path = str(write_vocabulary(model, str(folder / "own"))[0])
    configs = [TokenizerConfig(tokenizer_model=path, vocab_extra_ids=4, pre_tokenizer=kind) for kind in KINDS]
    return {config.pre_tokenizer: load_tokenizer(config) for config in configs} | {"path": path}


def test_it_is_part_of_what_a_tokenizer_is(tokenizers):
    """Data and checkpoints know a tokenizer by its checksum, so another pre-tokeniser is another tokenizer."""
    plain = Tokenizer.load(tokenizers["path"], 4)
    assert len({tokenizers[kind].sha256 for kind in KINDS}) == 3 and tokenizers["none"].sha256 == plain.sha256
    assert tokenizers["metro"].encode("(jumps).") == plain.encode("( jumps ).") != plain.encode("(jumps).")
    assert tokenizers["metro-lower"].encode("FOX") == plain.encode("fox") != tokenizers["metro"].encode("FOX")


def test_data_says_what_made_it(tokenizers, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "(FOX) jumps."}\n')
    tokenizer = tokenizers["metro-lower"]
    options = PreprocessOptions(inputs=(str(tmp_path / "text.jsonl"),), output_prefix=str(tmp_path / "data"))
    [prefix] = preprocess(options, tokenizer, lambda *_: None).prefixes
    note = json.loads(Path(f"{prefix}.json").read_text())
    assert (note["normalizer"], note["pre_tokenizer"]) == ("nmt_nfkc", "metro-lower")
    store = open_store(prefix, tokenizer.vocabulary, tokenizer.sha256)
    assert store.tokens.tolist() == [*tokenizer.encode("(FOX) jumps."), tokenizer.eos_id]
    other = tokenizers["metro"]
    with pytest.raises(DataError, match="--pre-tokenizer metro-lower, the run's is"):
        open_store(prefix, other.vocabulary, other.sha256)
    del note["normalizer"], note["pre_tokenizer"]
    Path(f"{prefix}.json").write_text(json.dumps({**note, "version": 1}))  # as this program wrote it before
    found = read_manifest(prefix)
    assert found is not None and (found.normalizer, found.pre_tokenizer) == ("unknown", "none")


def test_a_run_that_goes_on_keeps_it():
    saved = {"tokenizer_sha256": "ab" * 32, "pre_tokenizer": "metro"}
    now = {"tokenizer_sha256": "cd" * 32, "pre_tokenizer": "none"}
    [difference] = _compare_tokenizers(saved, now)
    assert (difference.flag, difference.old, difference.new) == ("--pre-tokenizer", "metro", "none")
    assert [found.flag for found in _compare_tokenizers({**saved, "pre_tokenizer": "none"}, now)] == [
        "--tokenizer-model"
    ]
