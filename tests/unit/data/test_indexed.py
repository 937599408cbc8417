"""Token files: the same bytes as megatron-core's, and everything damaged is refused with one line."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_metro.config.errors import DataError
from megatron_metro.data.indexed import TokenWriter, open_store, verify_store
from megatron_metro.tokenizer import NullTokenizer

TOKENIZER = NullTokenizer(1000, 10)


def write_megatron(prefix: str, documents: list[list[list[int]]], dtype: type = np.uint16) -> None:
    """As Megatron's own preprocessing writes: no manifest."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def write_ours(prefix: str, documents: list[list[list[int]]]) -> None:
    with TokenWriter(prefix, TOKENIZER, append_eod=True, split_lines=False) as writer:
        for document in documents:
            ids = np.array([token for sequence in document for token in sequence])
            writer.add_documents(ids, [[len(sequence) for sequence in document]])
        writer.finish()


def open_ours(prefix: str):
    return open_store(prefix, TOKENIZER.vocabulary, TOKENIZER.sha256)


DOCUMENTS = st.lists(
    st.lists(st.lists(st.integers(5, 999), min_size=1, max_size=8), min_size=1, max_size=3), min_size=1, max_size=6
)


@given(documents=DOCUMENTS)
@settings(max_examples=25, deadline=None)
def test_bytes_are_megatrons_both_ways(documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("indexed")
    write_ours(f"{folder}/ours", documents)
    write_megatron(f"{folder}/theirs", documents)
    for suffix in ("bin", "idx"):
        assert (folder / f"ours.{suffix}").read_bytes() == (folder / f"theirs.{suffix}").read_bytes()
    theirs = IndexedDataset(f"{folder}/ours")
    assert [theirs[i].tolist() for i in range(len(theirs))] == [s for document in documents for s in document]
    for name in ("ours", "theirs"):
        store = open_ours(f"{folder}/{name}")
        assert store.tokens.tolist() == [token for document in documents for s in document for token in s]
        assert store.num_documents == len(documents)
        offsets = [store.token_offset(i) for i in range(len(documents) + 1)]
        assert np.diff(offsets).tolist() == [sum(map(len, document)) for document in documents]
    assert sorted(path.name for path in folder.iterdir()) == [
        "ours.bin",
        "ours.idx",
        "ours.json",
        "theirs.bin",
        "theirs.idx",
    ]


@pytest.fixture
def prefix(tmp_path) -> str:
    write_ours(f"{tmp_path}/data", [[[10, 11, 12], [13, 2]], [[14, 15, 2]], [[16] * 20]])
    return f"{tmp_path}/data"


def test_tokens_outlive_other_references(prefix):
    tokens = open_ours(prefix)
    view = tokens.tokens[:3]
    assert view.tolist() == [10, 11, 12]


@pytest.mark.parametrize("bad", [-1, 1, 4, 1000, 65536 + 7, 2**31])
def test_writing_ids_that_would_wrap_is_refused(tmp_path, bad):
    with pytest.raises(DataError, match=f"id {bad}"), TokenWriter(f"{tmp_path}/data", TOKENIZER, True, False) as writer:
        writer.add_documents(np.array([10, bad]), [[2]])
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), TokenWriter(f"{tmp_path}/data", TOKENIZER, True, False) as writer:
        writer.add_documents(np.array([10, 11]), [[2]])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="no text"), TokenWriter(f"{tmp_path}/data", TOKENIZER, True, False) as writer:
        writer.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("has_manifest", [True, False])
def test_truncation_anywhere_is_refused(prefix, has_manifest):
    if not has_manifest:
        Path(f"{prefix}.json").unlink()
    for suffix in ("idx", "bin"):
        path = Path(f"{prefix}.{suffix}")
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            with pytest.raises(DataError, match=f"{path}"):
                open_ours(prefix)
        path.write_bytes(whole + b"\0\0")
        with pytest.raises(DataError, match=f"{path} has {len(whole) + 2} bytes"):
            open_ours(prefix)
        path.unlink()
        with pytest.raises(DataError, match=f"{path} is missing"):
            open_ours(prefix)
        path.write_bytes(whole)
    open_ours(prefix)


def test_every_flipped_bit_is_refused(prefix):
    for suffix in ("idx", "bin", "json"):
        path = Path(f"{prefix}.{suffix}")
        whole = path.read_bytes()
        for place in range(len(whole)):
            changed = bytearray(whole)
            changed[place] ^= 1 << (place % 8)
            path.write_bytes(changed)
            if suffix == "json" and path.read_bytes().split() == whole.split():
                continue  # white space
            try:
                store = open_ours(prefix)
            except DataError:
                continue
            # Counts in the manifest that nothing depends on may pass; tokens and documents never differ.
            assert suffix == "json", place
            assert len(store.tokens) == 28
        path.write_bytes(whole)


HEADER_FAULTS = {
    "magic": (0, b"X", "begins with"),
    "version": (9, struct.pack("<Q", 2), "version 2"),
    "dtype of floats": (17, b"\x06", "dtype code 6"),
    "unknown dtype": (17, b"\x63", "dtype code 99"),
    "other width": (17, b"\x04", "lengths and pointers"),
    "huge count": (18, struct.pack("<Q", 2**62), "sequences"),
    "no sequences": (18, struct.pack("<Q", 0), "need"),
    "negative length": (34, struct.pack("<i", -5), "lengths and pointers"),
    "other length": (34, struct.pack("<i", 4), "lengths and pointers"),
    "odd pointer": (34 + 4 * 4 + 8, struct.pack("<q", 7), "lengths and pointers"),
    "documents beyond the end": (34 + 12 * 4 + 24, struct.pack("<q", 9), "document table"),
    "documents going back": (34 + 12 * 4 + 8, struct.pack("<q", 4), "document table"),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_faults_in_an_index_without_manifest(prefix, fault):
    Path(f"{prefix}.json").unlink()
    place, value, message = HEADER_FAULTS[fault]
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    content[place : place + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_ours(prefix)
    assert "\n" not in str(caught.value)


def test_foreign_files_and_tokenizers_are_refused(prefix, tmp_path):
    other = NullTokenizer(999, 10)
    with pytest.raises(DataError, match="was made with tokenizer"):
        open_store(prefix, other.vocabulary, other.sha256)
    write_ours(f"{tmp_path}/other", [[[20, 11, 12], [13, 2]], [[14, 15, 2]], [[16] * 20]])
    shutil.copy(f"{tmp_path}/other.bin", f"{prefix}.bin")  # the same size, other tokens
    with pytest.raises(DataError, match="is damaged in the 16 MiB"):
        open_ours(prefix)


@pytest.mark.parametrize("bad", [1, 4, 1000, 1009, 40000])
def test_ids_that_are_no_text_are_refused_without_manifest(tmp_path, bad):
    write_megatron(f"{tmp_path}/data", [[[10, bad]]], np.int32)
    with pytest.raises(DataError, match=f"holds id {bad}"):
        open_ours(f"{tmp_path}/data")


def test_verify_reads_everything(tmp_path):
    documents = [[[10] * 400_000], [[10] * 200_000 + [1] + [10] * 200_000], [[10] * 400_000]]
    write_megatron(f"{tmp_path}/data", documents)
    open_ours(f"{tmp_path}/data")  # only both ends are looked at
    with pytest.raises(DataError, match="holds id 1"):
        verify_store(f"{tmp_path}/data", TOKENIZER.vocabulary, TOKENIZER.sha256)


def test_writing_again_replaces_the_whole_set(prefix):
    write_ours(prefix, [[[20, 21]]])
    assert open_ours(prefix).tokens.tolist() == [20, 21]
