"""The note beside a token file: which tokenizer made it, what it holds, and checksums of both its files."""

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from megatron_metro.config.errors import DataError

MANIFEST_VERSION = 2
# What version 1 did not say: there was no pre-tokeniser then.
_ADDED = {"normalizer": "unknown", "pre_tokenizer": "none"}
CHECKSUM_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """How the tokens of a data set were made."""

    tokenizer_sha256: str
    num_pieces: int
    append_eod: bool
    split_lines: bool
    # Known by the checksum already; named for people.
    normalizer: str = field(compare=False)
    pre_tokenizer: str = field(compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Facts about one pair of .bin and .idx files; the .bin has a CRC-32 per 16 MiB, so that a sample is cheap."""

    tokenizer_sha256: str
    num_pieces: int
    num_documents: int
    num_sequences: int
    num_tokens: int
    dtype: str
    append_eod: bool
    split_lines: bool
    bin_bytes: int
    idx_bytes: int
    idx_sha256: str
    bin_crc32: tuple[int, ...]
    normalizer: str
    pre_tokenizer: str
    version: int = MANIFEST_VERSION

    @property
    def origin(self) -> Origin:
        """What data sets must share to be one."""
        return Origin(
            tokenizer_sha256=self.tokenizer_sha256,
            num_pieces=self.num_pieces,
            append_eod=self.append_eod,
            split_lines=self.split_lines,
            normalizer=self.normalizer,
            pre_tokenizer=self.pre_tokenizer,
        )

    def to_json(self) -> bytes:
        """The manifest as a JSON file."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


def manifest_path(prefix: str) -> Path:
    """Where the manifest of a data set lies."""
    return Path(f"{prefix}.json")


def read_manifest(prefix: str) -> Manifest | None:
    """The manifest of a data set; None where Megatron's own tool wrote the data. DataError when it is damaged."""
    path = manifest_path(prefix)
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({_shorten(error)}); preprocess the data again") from error
    if isinstance(values, dict) and values.get("version") == 1:
        values = {**_ADDED, **values, "version": MANIFEST_VERSION}
    if not isinstance(values, dict) or values.get("version") != MANIFEST_VERSION:
        raise DataError(f"{path} is no manifest of version {MANIFEST_VERSION}; preprocess the data again")
    wrong = [known.name for known in fields(Manifest) if not _has_kind(values.get(known.name), known.type)]
    if wrong or len(values) != len(fields(Manifest)):
        raise DataError(f"{path} is damaged: fields {wrong or sorted(values)}; preprocess the data again")
    return Manifest(**{**values, "bin_crc32": tuple(values["bin_crc32"])})


def hash_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHECKSUM_BLOCK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def block_checksums(path: Path) -> Iterator[int]:
    """CRC-32 of each 16 MiB of a file."""
    with path.open("rb") as stream:
        while block := stream.read(CHECKSUM_BLOCK_BYTES):
            yield zlib.crc32(block)


def check_files(prefix: str, manifest: Manifest, all_blocks: bool = False) -> None:
    """Compare both files with the manifest: all of the .idx, and of the .bin the first and last block or everything."""
    for suffix, needed in (("bin", manifest.bin_bytes), ("idx", manifest.idx_bytes)):
        path = Path(f"{prefix}.{suffix}")
        if (found := path.stat().st_size) != needed:
            raise DataError(f"{path} has {found} bytes, its manifest says {needed}; copy or preprocess the data again")
    if hash_file(Path(f"{prefix}.idx")) != manifest.idx_sha256:
        raise DataError(f"{prefix}.idx does not have the checksum of its manifest; copy or preprocess the data again")
    path = Path(f"{prefix}.bin")
    num_blocks = len(manifest.bin_crc32)
    with path.open("rb") as stream:
        for block in range(num_blocks) if all_blocks else sorted({0, num_blocks - 1}):
            stream.seek(block * CHECKSUM_BLOCK_BYTES)
            if zlib.crc32(stream.read(CHECKSUM_BLOCK_BYTES)) != manifest.bin_crc32[block]:
                raise DataError(
                    f"{path} is damaged in the 16 MiB after byte {block * CHECKSUM_BLOCK_BYTES}; "
                    "copy or preprocess the data again"
                )


def _has_kind(value: object, kind: object) -> bool:
    if kind in (int, str, bool):
        return type(value) is kind
    return isinstance(value, list) and all(type(item) is int for item in value)


def _shorten(error: Exception) -> str:
    return str(error).splitlines()[0][:100] if str(error) else type(error).__name__
