"""Data sets joined into one: the same bytes as Megatron's builder makes, one manifest, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_metro.config.errors import ConfigError, DataError
from megatron_metro.data.indexed import TokenWriter, verify_store
from megatron_metro.data.merging import find_stores, merge_stores
from megatron_metro.tokenizer import NullTokenizer

TOKENIZER = NullTokenizer(1000, 10)


def write(prefix: str, documents: list[list[int]], tokenizer: NullTokenizer = TOKENIZER, split_lines: bool = False):
    with TokenWriter(prefix, tokenizer, append_eod=True, split_lines=split_lines) as writer:
        for lengths in documents:
            writer.add_documents(np.arange(10, 10 + sum(lengths)), [lengths])
        writer.finish()


@pytest.fixture
def folder(tmp_path) -> Path:
    inputs = tmp_path / "inputs"
    write(f"{inputs}/b.v2", [[3], [1, 2]])
    write(f"{inputs}/a", [[5, 5], [7]])
    return inputs


def test_documents_follow_each_other(folder, tmp_path):
    prefixes = find_stores(str(folder))
    assert [Path(prefix).name for prefix in prefixes] == ["a", "b.v2"]
    output = f"{tmp_path}/out/merged"
    report = merge_stores(prefixes, output)
    store = verify_store(output, TOKENIZER.vocabulary, TOKENIZER.sha256)
    assert store.manifest == report.manifest
    assert store.sequence_lengths.tolist() == [5, 5, 7, 3, 1, 2]
    assert store.document_ends.tolist() == [0, 2, 3, 4, 6]
    assert (report.manifest.num_documents, report.manifest.num_sequences, report.manifest.num_tokens) == (4, 6, 23)
    builder = IndexedDatasetBuilder(f"{tmp_path}/core.bin", dtype=DType.optimal_dtype(TOKENIZER.vocab_size))
    for prefix in prefixes:
        builder.add_index(prefix)
    builder.finalize(f"{tmp_path}/core.idx")
    for suffix in ("bin", "idx"):
        assert Path(f"{output}.{suffix}").read_bytes() == Path(f"{tmp_path}/core.{suffix}").read_bytes()


def test_without_manifests_there_is_none(folder, tmp_path):
    for path in folder.glob("*.json"):
        path.unlink()
    report = merge_stores(find_stores(str(folder)), f"{tmp_path}/out")
    assert report.manifest is None
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.bin", "out.idx"]


def remove_one_manifest(folder: Path) -> None:
    (folder / "a.json").unlink()


def use_another_tokenizer(folder: Path) -> None:
    write(f"{folder}/c", [[3]], NullTokenizer(1001, 10))


def use_another_form(folder: Path) -> None:
    write(f"{folder}/c", [[3]], split_lines=True)


def use_another_type(folder: Path) -> None:
    write(f"{folder}/c", [[3]], NullTokenizer(70_000, 10))


def remove_tokens(folder: Path) -> None:
    (folder / "a.bin").unlink()


def flip_bit(folder: Path) -> None:
    content = bytearray((folder / "a.bin").read_bytes())
    content[3] ^= 1
    (folder / "a.bin").write_bytes(content)


FAULTS = {
    remove_one_manifest: r"a\.json is missing while .*b\.v2",
    use_another_tokenizer: "c was made with tokenizer_sha256",
    use_another_form: "c was made with split_lines True",
    use_another_type: r"c\.bin holds int32, .*a\.bin uint16",
    remove_tokens: r"a\.bin is missing",
    flip_bit: r"a\.bin is damaged",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_does_not_belong_together_is_refused(folder, tmp_path, fault):
    fault(folder)
    with pytest.raises(DataError, match=FAULTS[fault]):
        merge_stores(find_stores(str(folder)), f"{tmp_path}/out")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_result_is_not_merged_into_itself(folder):
    merge_stores(find_stores(str(folder)), f"{folder}/merged")
    with pytest.raises(ConfigError, match="--output-prefix"):
        merge_stores(find_stores(str(folder)), f"{folder}/merged")


def test_folders_without_data(tmp_path):
    for name in ("none", "."):
        with pytest.raises(DataError, match="--input"):
            find_stores(f"{tmp_path}/{name}")
