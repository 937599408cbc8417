"""Several data sets joined into one: the documents of one after those of the other, tokens unchanged."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_metro.config.errors import ConfigError, DataError
from megatron_metro.data.indexed import StoreFiles, check_index, list_store_files
from megatron_metro.data.manifest import Manifest, Origin, check_files, read_manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """What was joined."""

    prefixes: tuple[str, ...]
    manifest: Manifest | None  # None where the inputs, made by Megatron's own tool, have none


def find_stores(folder: str) -> tuple[str, ...]:
    """Prefixes of all data sets in a folder by name; DataError when there are none, or half of one."""
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"--input {folder} is not a folder; give the one that holds .bin and .idx files")
    files = [file for file in sorted(path.iterdir()) if file.suffix in (".bin", ".idx") and file.is_file()]
    prefixes = tuple(dict.fromkeys(str(file.with_suffix("")) for file in files))
    if not prefixes:
        raise DataError(f"--input {folder} holds no .bin and .idx files; give the folder of preprocessed data")
    return prefixes


def merge_stores(prefixes: Sequence[str], output_prefix: str) -> MergeReport:
    """Check every byte of the data sets and write them, in this order, as one; on any error nothing is left.

    They must have the same type of tokens and, where they have manifests, the same tokenizer and form.
    """
    outputs = {path.resolve() for path in list_store_files(output_prefix)}
    for prefix in prefixes:
        if outputs & {path.resolve() for path in list_store_files(prefix)}:
            raise ConfigError(f"--output-prefix {output_prefix} is one of the data sets of --input; choose another")
    kinds = [check_index(prefix) for prefix in prefixes]
    manifests = [read_manifest(prefix) for prefix in prefixes]
    origins = [None if manifest is None else manifest.origin for manifest in manifests]
    for prefix, kind, origin in zip(prefixes, kinds, origins):
        if kind is not kinds[0]:
            raise DataError(
                f"{prefix}.bin holds {kind.__name__}, {prefixes[0]}.bin {kinds[0].__name__}; preprocess both with one "
                "tokenizer"
            )
        _check_origin(prefix, origin, prefixes[0], origins[0])
    with StoreFiles(output_prefix, kinds[0]) as files:
        for prefix, manifest in zip(prefixes, manifests):
            if manifest is not None:
                check_files(prefix, manifest, all_blocks=True)
            files.builder.add_index(prefix)
        merged = files.publish(origins[0])
    return MergeReport(prefixes=tuple(prefixes), manifest=merged)


def _check_origin(prefix: str, found: Origin | None, first: str, expected: Origin | None) -> None:
    if found is None or expected is None:
        if found is not expected:
            bare, other = (prefix, first) if found is None else (first, prefix)
            raise DataError(
                f"{bare}.json is missing while {other} has a manifest; copy it, or preprocess the data again"
            )
        return
    for field in fields(Origin):
        values = getattr(found, field.name), getattr(expected, field.name)
        if values[0] != values[1] and field.compare:
            raise DataError(
                f"{prefix} was made with {field.name} {values[0]}, {first} with {values[1]}; preprocess both alike"
            )
