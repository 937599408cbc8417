"""Data, tokenizer and configuration files that try to run code or exhaust memory: refused, and nothing is run."""

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_metro.config.cli import load_config
from megatron_metro.config.errors import MetroError
from megatron_metro.data.cache import load_or_build
from megatron_metro.data.indexed import open_store
from megatron_metro.data.preprocess import PreprocessOptions, preprocess
from megatron_metro.tokenizer import Tokenizer
from tests.helpers.corpus import Corpus, ignore_progress
from tests.helpers.hostile import payloads


@pytest.fixture
def canary(tmp_path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def contents(canary) -> dict[str, bytes]:
    """What is put in place of any file."""
    found = {name: content for name, (content, _) in payloads(f"touch {canary}").items()}
    pickled = np.frombuffer(found["protocol 4"], np.uint8).tobytes()
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    found["object array"] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + pickled
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    found |= {"npz": buffer.getvalue(), "empty": b"", "zeros": bytes(4096), "ones": b"\xff" * 4096}
    found["JSON bomb"] = b"[" * 100_000
    found["huge counts"] = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2**62, 2**62) + bytes(64)
    found["negative counts"] = b"MMIDIDX\x00\x00" + struct.pack("<QBqq", 1, 8, -1, -1) + bytes(64)
    return found


def copy_store(corpus: Corpus, folder: Path) -> str:
    for suffix in ("bin", "idx", "json"):
        (folder / f"data.{suffix}").write_bytes(Path(f"{corpus.prefix}.{suffix}").read_bytes())
    return str(folder / "data")


@pytest.mark.parametrize("suffix", ["bin", "idx", "json"])
def test_token_files(suffix, contents, corpus, canary, tmp_path):
    prefix = copy_store(corpus, tmp_path)
    for name, content in contents.items():
        Path(f"{prefix}.{suffix}").write_bytes(content)
        with pytest.raises(MetroError) as refusal:
            open_store(prefix, corpus.tokenizer.vocabulary, corpus.tokenizer.sha256)
        assert refusal.value.exit_code == 65, name
    assert not canary.exists()


def test_token_files_without_a_manifest(contents, corpus, canary, tmp_path):
    prefix = copy_store(corpus, tmp_path)
    Path(f"{prefix}.json").unlink()
    for content in contents.values():
        Path(f"{prefix}.idx").write_bytes(content)
        with pytest.raises(MetroError):
            open_store(prefix, corpus.tokenizer.vocabulary, corpus.tokenizer.sha256)
    assert not canary.exists()


def test_cached_arrays(contents, canary, tmp_path):
    built = {"a": np.arange(3)}
    load_or_build(str(tmp_path), "key", lambda: built)
    (entry,) = tmp_path.glob("*.arrays")
    for content in contents.values():
        entry.write_bytes(content)
        assert load_or_build(str(tmp_path), "key", lambda: built)["a"].tolist() == [0, 1, 2]
    assert not canary.exists()


def test_tokenizers(contents, canary, tmp_path):
    for content in contents.values():
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(MetroError) as refusal:
            Tokenizer.load(tmp_path / "tokenizer.model", 8)
        assert refusal.value.exit_code == 65
    assert not canary.exists()


YAML = {
    "object": "model: !!python/object/apply:os.system ['touch {canary}']",
    "module": "!!python/module:os",
    "new": "model: !!python/object/new:os.system ['touch {canary}']",
    "name": "lr: !!python/name:os.system",
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    "merge": "model: {{<<: {{hidden_size: 4}}}}",
    "deep": "[" * 5000,
    "two documents": "seed: 1\n---\nseed: 2",
}


def test_configurations(contents, canary, tmp_path):
    texts = {name: text.format(canary=canary).encode() for name, text in YAML.items()}
    for name, content in {**contents, **texts}.items():
        if content.strip(b"\0"):
            (tmp_path / "config.yaml").write_bytes(content)
            with pytest.raises(MetroError) as refusal:
                load_config(tmp_path / "config.yaml")
            assert refusal.value.exit_code == 64, name
    assert not canary.exists()


def test_text(contents, corpus, canary, tmp_path):
    files = {**contents, "pickle in gzip": gzip.compress(contents["protocol 4"])}
    for name, content in files.items():
        suffix = ".jsonl.gz" if "gzip" in name else ".jsonl"
        path = tmp_path / f"text{suffix}"
        path.write_bytes(content)
        with pytest.raises(MetroError) as refusal:
            options = PreprocessOptions(inputs=(str(path),), output_prefix=str(tmp_path / "out"))
            preprocess(options, corpus.tokenizer, ignore_progress)
        assert refusal.value.exit_code == 65, name
        path.unlink()
    assert not canary.exists() and not list(tmp_path.glob("out*"))
