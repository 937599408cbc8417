"""The manifest vouches for every byte of a step, itself included."""

import hashlib
import json
import os
import random
from dataclasses import asdict

import pytest

from megatron_metro.checkpoint.manifest import MANIFEST, hash_file, read_manifest, verify_step, write_manifest
from megatron_metro.config.errors import CheckpointError

DOCUMENT = {"version": 1, "train": {"iteration": 10}, "sizes": (1, 2), "rate": 1e-4, "name": "Ünï"}


@pytest.fixture
def step(tmp_path):
    """A folder of a few files of random bytes, with its manifest."""
    folder = tmp_path / "iter_0000010"
    folder.mkdir()
    generator = random.Random(1)
    for name, size in (("__0_0.distcp", 3000), ("__1_0.distcp", 3_000_001), (".metadata", 200), ("empty", 0)):
        (folder / name).write_bytes(generator.randbytes(size))
    write_manifest(folder, DOCUMENT)
    return folder


def assert_refused(step, words):
    with pytest.raises(CheckpointError, match=words) as refusal:
        verify_step(step)
    assert "\n" not in str(refusal.value)


def test_it_holds_sizes_and_hashes_and_what_the_run_was(step):
    verify_step(step)
    document = read_manifest(step)
    files = document.pop("files")
    assert files.keys() == {"__0_0.distcp", "__1_0.distcp", ".metadata", "empty"}
    for name, record in files.items():
        content = (step / name).read_bytes()
        assert record == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del document["sha256"]
    assert document == json.loads(json.dumps(DOCUMENT))


def test_known_files_are_not_read_again(tmp_path):
    (tmp_path / "shard").write_bytes(b"abc")
    (tmp_path / "other").write_bytes(b"de")
    record = hash_file(tmp_path / "shard")
    write_manifest(tmp_path, {}, {"shard": record})
    assert read_manifest(tmp_path)["files"]["shard"] == asdict(record)
    verify_step(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(OSError, match="was written and is gone"):
        write_manifest(tmp_path, {}, {"shard": record, "gone": record})


def test_a_missing_extra_or_resized_file_is_named(step):
    shard = step / "__0_0.distcp"
    whole = shard.read_bytes()
    shard.unlink()
    assert_refused(step, r"__0_0.distcp: is missing \(1 such files\)")
    shard.write_bytes(whole[:-1])
    assert_refused(step, "__0_0.distcp: has 2999 bytes, manifest.json says 3000")
    shard.write_bytes(whole)
    (step / "__2_0.distcp").write_bytes(b"")
    assert_refused(step, r"__2_0.distcp: is not in manifest.json")


def test_what_is_no_regular_file_is_refused_without_being_read(step, tmp_path):
    shard = step / "__0_0.distcp"
    (tmp_path / "elsewhere").write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(tmp_path / "elsewhere")
    assert_refused(step, "__0_0.distcp: is no regular file")
    with pytest.raises(OSError):
        hash_file(shard)
    shard.unlink()
    os.mkfifo(shard)
    assert_refused(step, "__0_0.distcp: is no regular file")
    with pytest.raises(OSError, match="no regular file"):
        hash_file(shard)


def test_swapped_files_are_refused(step):
    (step / "empty").unlink()
    (step / MANIFEST).unlink()
    (step / "__1_0.distcp").write_bytes(bytes(reversed((step / "__0_0.distcp").read_bytes())))
    write_manifest(step, DOCUMENT)
    (step / "__0_0.distcp").rename(step / "x")
    (step / "__1_0.distcp").rename(step / "__0_0.distcp")
    (step / "x").rename(step / "__1_0.distcp")
    assert_refused(step, r"__\d_0.distcp: is damaged")


def test_every_byte_of_the_manifest_counts(step):
    path = step / MANIFEST
    whole = path.read_bytes()
    generator = random.Random(2)
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        assert_refused(step, "manifest.json: is damaged")
    for changed in (
        whole[:-1],
        whole + b" ",
        whole.replace(b"\n", b"\r\n"),
        b"",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b"\xff",
    ):
        path.write_bytes(changed)
        assert_refused(step, "manifest.json: is damaged")
    path.unlink()
    assert_refused(step, r"iter_0000010: holds no manifest.json, so nothing vouches")
    path.symlink_to(step / "empty")
    assert_refused(step, "manifest.json: is no regular file")


def test_a_rewritten_manifest_with_a_key_twice_is_refused(step):
    path = step / MANIFEST
    path.write_bytes(path.read_bytes().replace(b"{\n", b'{\n "version": 1,\n', 1))
    assert_refused(step, "manifest.json: is damaged")


@pytest.mark.parametrize("records", [{"a": {"size": 1}}, {"a": []}, [], {"a": {"size": "1", "sha256": "x"}}])
def test_records_of_another_form_are_refused(tmp_path, records):
    body = {"files": records}
    digest = hashlib.sha256((json.dumps(body, indent=1, sort_keys=True) + "\n").encode()).hexdigest()
    text = json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n"
    (tmp_path / MANIFEST).write_text(text)
    assert_refused(tmp_path, "manifest.json: is damaged")


def test_bit_flips_in_all_files_are_refused(step):
    generator = random.Random(3)
    for path in sorted(step.iterdir()):
        if not (size := path.stat().st_size):
            continue
        for _ in range(20):
            position, bit = generator.randrange(size), generator.randrange(8)
            with path.open("r+b") as file:
                file.seek(position)
                byte = file.read(1)[0]
                file.seek(position)
                file.write(bytes([byte ^ (1 << bit)]))
                file.flush()
                assert_refused(step, f"{path.name}: is damaged")
                file.seek(position)
                file.write(bytes([byte]))
    verify_step(step)
