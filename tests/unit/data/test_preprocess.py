"""From text to token files: the same bytes for any number of workers, and every bad input named with file and line."""

import gzip
import json
import os
import random
import signal
from pathlib import Path

import pytest
import zstandard

from megatron_metro.config.errors import DataError, StorageError
from megatron_metro.data.corpus import CHUNK_BYTES, Document, find_inputs, parse_chunk, read_chunks
from megatron_metro.data.indexed import open_store, verify_store
from megatron_metro.data.preprocess import PreprocessOptions, preprocess
from megatron_metro.data.workers import WorkerDied
from megatron_metro.tokenizer import NullTokenizer
from tests.helpers.corpus import Corpus, ignore_progress

TOKENIZER = NullTokenizer(1000, 10)


def run(folder: Path, *inputs: Path, name: str = "out", **options) -> list[bytes]:
    """Preprocess with the NullTokenizer; the bytes of the .bin, the .idx and the manifest."""
    options = PreprocessOptions(inputs=tuple(map(str, inputs)), output_prefix=f"{folder}/{name}", **options)
    report = preprocess(options, TOKENIZER, ignore_progress)
    return [Path(f"{report.prefixes[0]}.{suffix}").read_bytes() for suffix in ("bin", "idx", "json")]


def write_lines(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> Path:
    """Text of several chunks."""
    generator = random.Random(5)
    path = tmp_path_factory.mktemp("numbers") / "numbers.jsonl"
    with path.open("w") as stream:
        while stream.tell() < 3.2 * CHUNK_BYTES:
            words = [str(generator.randint(5, 999)) for _ in range(generator.randint(1, 2000))]
            stream.write(json.dumps({"text": " ".join(words), "id": 1}) + "\n")
    return path


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, numbers):
    outputs = [run(tmp_path, numbers, name=f"w{count}", num_workers=count) for count in (1, 2, 7)]
    assert outputs[0] == outputs[1] == outputs[2]
    verify_store(f"{tmp_path}/w1_text_document", TOKENIZER.vocabulary, TOKENIZER.sha256)


def test_compression_changes_nothing(tmp_path, numbers):
    content = numbers.read_bytes()
    packed = tmp_path / "a.jsonl.gz", tmp_path / "a.jsonl.zst"
    packed[0].write_bytes(gzip.compress(content, 1))
    packed[1].write_bytes(zstandard.compress(content[:1000]) + zstandard.compress(content[1000:]))
    expected = run(tmp_path, numbers, name="plain")
    assert [run(tmp_path, path, name=path.suffix[1:]) for path in packed] == [expected, expected]


@pytest.mark.parametrize("missing_bytes", [1, 5, 20])
def test_a_zstd_file_that_is_cut_short_is_no_shorter_text(tmp_path, missing_bytes):
    """Zstandard's blocks of 128 KiB end where lines of 16 bytes do, so what is left would pass for whole JSON."""
    whole = b'{"text": "5 6"}\n'
    packed = zstandard.compress(whole * 30_000)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packed + packed)
    assert len(run(tmp_path, path)[0]) == 2 * 30_000 * 3 * 2  # two ids of two bytes and </s> each
    path.write_bytes((packed + packed)[:-missing_bytes])
    with pytest.raises(DataError, match=f"{path} cannot be read: Compressed file ended before"):
        run(tmp_path, path, name="cut")
    assert not list(tmp_path.glob("cut*"))


def test_tokens_and_ends_of_documents(tmp_path):
    text = write_lines(
        tmp_path / "a.jsonl", '{"text": "5 6\\n7"}', "", '{"text": "8"}', '{"text": " "}', '{"text": ""}'
    )
    cases = (
        ({}, "document", [5, 6, 7, 2, 8, 2], [4, 2]),
        ({"append_eod": False}, "document", [5, 6, 7, 8], [3, 1]),
        ({"split_lines": True}, "sentence", [5, 6, 2, 7, 2, 8, 2], [3, 2, 2]),
    )
    for options, level, tokens, lengths in cases:
        options = PreprocessOptions(inputs=(str(text),), output_prefix=f"{tmp_path}/b", **options)
        report = preprocess(options, TOKENIZER, ignore_progress)
        assert report.prefixes == (f"{tmp_path}/b_text_{level}",)
        assert (report.num_documents, report.num_tokens, report.num_empty) == (2, len(tokens), 2)
        store = open_store(report.prefixes[0], TOKENIZER.vocabulary, TOKENIZER.sha256)
        assert store.tokens.tolist() == tokens
        assert store.sequence_lengths.tolist() == lengths
        assert store.num_documents == 2
        assert store.manifest.split_lines == (level == "sentence")


def test_several_keys_and_folders(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    write_lines(tmp_path / "in" / "b.jsonl", '{"x": "5", "y": "6"}')
    write_lines(tmp_path / "in" / "deep" / "a.json", '{"x": "7", "y": "8"}')
    write_lines(tmp_path / "in" / "notes.csv", "not text")
    options = PreprocessOptions(inputs=(str(tmp_path / "in"),), output_prefix=f"{tmp_path}/out", json_keys=("x", "y"))
    preprocess(options, TOKENIZER, ignore_progress)
    for key, tokens in (("x", [5, 2, 7, 2]), ("y", [6, 2, 8, 2])):
        store = open_store(f"{tmp_path}/out_{key}_document", TOKENIZER.vocabulary, TOKENIZER.sha256)
        assert store.tokens.tolist() == tokens
    assert [path.name for path in find_inputs([f"{tmp_path}/in/*.jsonl"])] == ["b.jsonl"]


def test_plain_text_becomes_documents_of_paragraphs(tmp_path):
    paragraphs = [f"word{i} " * 60 + f"\nline two of {i}" for i in range(40)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    (chunk,) = read_chunks([path])
    documents = list(parse_chunk(chunk, ("text",)))
    assert all(isinstance(document, Document) for document in documents)
    assert "\n".join(document.texts[0] for document in documents).split() == " ".join(paragraphs).split()
    assert all(len(document.texts[0]) >= 2000 for document in documents[:-1])
    lines = path.read_text().split("\n")
    for document in documents:
        number = int(document.place.rpartition(":")[2])
        assert document.texts[0].startswith(lines[number - 1].strip())


BAD_LINES = {
    "not JSON": (b"hello", "is not JSON"),
    "cut off": (b'{"text": "5', "is not JSON"),
    "two objects": (b'{"text": "5"}{"text": "6"}', "is not JSON"),
    "array": (b'["5"]', "holds list"),
    "number": (b"5", "holds int"),
    "missing key": (b'{"title": "5"}', "has no key 'text'"),
    "null": (b'{"text": null}', "has NoneType for key 'text'"),
    "number as text": (b'{"text": 5}', "has int for key 'text'"),
    "list as text": (b'{"text": ["5"]}', "has list for key 'text'"),
    "invalid UTF-8": (b'{"text": "\xff"}', "is not valid UTF-8"),
    "half a surrogate pair": (b'{"text": "\\ud800"}', "is not valid UTF-8"),
    "byte order mark": (b'\xef\xbb\xbf{"text": "5"}', "is not JSON"),
    "UTF-16": ('{"text": "5"}'.encode("utf-16"), "is not"),
    "deep": (b"[" * 100_000, "nested too deeply|is not JSON"),
}


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("fault", BAD_LINES)
def test_bad_lines(tmp_path, fault, num_workers):
    line, message = BAD_LINES[fault]
    text = write_lines(tmp_path / "a.jsonl", '{"text": "5"}', line, '{"text": "6"}')
    with pytest.raises(DataError, match=f"a.jsonl:2 .*({message})") as caught:
        run(tmp_path, text, num_workers=num_workers)
    assert caught.value.exit_code == 65
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    options = PreprocessOptions(
        inputs=(str(text),), output_prefix=f"{tmp_path}/b", on_error="skip", num_workers=num_workers
    )
    report = preprocess(options, TOKENIZER, ignore_progress)
    assert (report.num_documents, report.num_bad) == (2, 1)
    assert report.bad_lines[0].place == f"{text}:2"


def test_bad_files(tmp_path):
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"text": "5"}\n' * 1000)[:-20])
    no_gzip = write_lines(tmp_path / "plain.jsonl.gz", '{"text": "5"}')
    no_zstd = write_lines(tmp_path / "plain.jsonl.zst", '{"text": "5"}')
    empty = write_lines(tmp_path / "empty.jsonl")
    before = sorted(tmp_path.iterdir())
    for path, message in ((broken, "cannot be read"), (no_gzip, "cannot be read"), (no_zstd, "cannot be read")):
        with pytest.raises(DataError, match=f"{path} {message}"):
            run(tmp_path, path)
    with pytest.raises(DataError, match="holds no text"):
        run(tmp_path, empty)
    with pytest.raises(DataError, match="names no file"):
        run(tmp_path, tmp_path / "absent.jsonl")
    assert sorted(tmp_path.iterdir()) == before


def test_a_killed_worker_is_named(tmp_path, numbers):
    options = PreprocessOptions(inputs=(str(numbers),), output_prefix=f"{tmp_path}/out", num_workers=2)

    class Suicidal(NullTokenizer):
        def encode_batch(self, texts):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerDied, match=r"preprocessing worker 0 \(pid \d+\) was killed by SIGKILL"):
        preprocess(options, Suicidal(1000, 10), ignore_progress)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    text = write_lines(tmp_path / "a.jsonl", '{"text": "5"}')
    with pytest.raises(StorageError, match=r"cannot write .*a.jsonl/out"):
        run(text, text)


def test_real_text_comes_back(corpus: Corpus):
    store = open_store(corpus.prefix, corpus.tokenizer.vocabulary, corpus.tokenizer.sha256)
    assert store.num_documents == len(corpus.texts)
    for i in (0, 5, len(corpus.texts) - 1):
        tokens = store.tokens[store.token_offset(i) : store.token_offset(i + 1)].tolist()
        assert tokens[-1] == corpus.tokenizer.eos_id
        assert corpus.tokenizer.decode(tokens) == " ".join(corpus.texts[i].split())
