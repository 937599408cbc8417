"""Tokenizers in Hugging Face folders: METRO's (`fairseq_t5`) with its dictionary, and T5's. No transformers needed.

Both are a SentencePiece model and a few settings. METRO's dictionary repeats the pieces in the order of their ids; a
folder where it does not is refused, since its weights were trained with other ids than its text would get.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_metro.config.errors import ConfigError, DataError
from megatron_metro.config.schema import RunConfig, TokenizerConfig
from megatron_metro.conversion.tensor_files import read_json
from megatron_metro.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer

METRO_MODEL, METRO_DICTIONARY, T5_MODEL = "sp.model", "dict.txt", "spiece.model"
_SETTINGS = "tokenizer_config.json"
_NUM_SPECIAL = 4  # <s>, pad, </s>, unk, which the dictionary leaves out
_MAX_SENTINELS = 1 << 20
_SPECIAL_NAMES = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def read_tokenizer(folder: Path, default: TokenizerConfig) -> TokenizerConfig:
    """The tokenizer that a folder holds, or `default` where it holds none. Raises DataError or CheckpointError."""
    model = next((folder / name for name in (METRO_MODEL, T5_MODEL) if (folder / name).is_file()), None)
    if model is None:
        return default
    values = read_json(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}
    found = replace(default, tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model.resolve()))
    if model.name == T5_MODEL:
        return replace(found, vocab_extra_ids=_read_count(values, "extra_ids", default.vocab_extra_ids, folder))
    lowers = values.get("lower", True) is not False
    pre_tokenizer = values.get("pre_tokenizer", "metro-lower" if lowers else "metro")
    if pre_tokenizer not in ("none", "metro", "metro-lower"):
        raise DataError(f"{folder / _SETTINGS}: pre_tokenizer is none of none, metro, metro-lower; give one of them")
    num_sentinels = _read_count(values, "n_sentinel_tokens", default.vocab_extra_ids, folder)
    if (folder / METRO_DICTIONARY).is_file():
        _check_dictionary(folder, num_sentinels)
    return replace(found, vocab_extra_ids=num_sentinels, pre_tokenizer=pre_tokenizer)


def _read_count(values: dict[str, Any], name: str, default: int, folder: Path) -> int:
    value = values.get(name, default)
    if type(value) is not int or not 1 <= value <= _MAX_SENTINELS:
        raise DataError(f"{folder / _SETTINGS}: {name} is no number of sentinels; give one from 1 on")
    return value


def _check_dictionary(folder: Path, num_sentinels: int) -> None:
    """The dictionary's symbols are the model's pieces: the name of id n stands in line n - 4."""
    tokenizer = Tokenizer.load(folder / METRO_MODEL, num_sentinels)
    expected = list_dictionary(tokenizer)
    try:
        lines = (folder / METRO_DICTIONARY).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / METRO_DICTIONARY} cannot be read ({type(error).__name__}); get it again") from error
    found = [line.rsplit(" ", 1)[0] for line in lines]
    if found != expected:
        place = next(
            (i for i, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]), min(map(len, (found, expected)))
        )
        raise DataError(
            f"{folder / METRO_DICTIONARY}, line {place + 1}: is not piece {place + _NUM_SPECIAL} of {METRO_MODEL}, so "
            "ids and weights do not belong together; give the files that were released together"
        )


def list_dictionary(tokenizer: SentencePieceTokenizer) -> list[str]:
    """Symbols of fairseq's dictionary: all pieces but the special ones."""
    return [tokenizer.name_piece(token) for token in range(_NUM_SPECIAL, tokenizer.num_pieces)]


def open_tokenizer(run: RunConfig, sha256: str | None = None) -> SentencePieceTokenizer | None:
    """The tokenizer of a run that is to be converted; None where it has none that is a file.

    Raises DataError or ConfigError where it cannot be read, has another number of ids than the model has rows, or is
    not the one whose checksum is recorded beside the weights.
    """
    if run.tokenizer.tokenizer_model is None or run.tokenizer.tokenizer_type == "NullTokenizer":
        return None
    tokenizer = load_tokenizer(run.tokenizer, run.model.vocab_size)
    assert isinstance(tokenizer, SentencePieceTokenizer), "a model file makes no other"
    if sha256 is not None and tokenizer.sha256 != sha256:
        raise ConfigError(
            f"--tokenizer-model {run.tokenizer.tokenizer_model} with --pre-tokenizer {run.tokenizer.pre_tokenizer} has "
            f"checksum {tokenizer.sha256[:12]}, the weights were trained with {sha256[:12]}; give that tokenizer"
        )
    return tokenizer


def write_tokenizer(tokenizer: SentencePieceTokenizer, config: TokenizerConfig, folder: Path) -> None:
    """METRO's files or T5's, by the vocabulary. Raises OSError."""
    vocabulary = tokenizer.vocabulary
    values: dict[str, Any] = dict(_SPECIAL_NAMES)
    if vocabulary.is_t5:
        del values["bos_token"]
        values |= {"tokenizer_class": "T5Tokenizer", "extra_ids": vocabulary.num_sentinels}
        (folder / T5_MODEL).write_bytes(tokenizer.model)
    else:
        values |= {"tokenizer_class": "FairseqT5Tokenizer", "n_sentinel_tokens": vocabulary.num_sentinels}
        values |= {"lower": config.pre_tokenizer != "metro", "pre_tokenizer": config.pre_tokenizer}
        (folder / METRO_MODEL).write_bytes(tokenizer.model)
        lines = (f"{name} 1\n" for name in list_dictionary(tokenizer))
        (folder / METRO_DICTIONARY).write_text("".join(lines), encoding="utf-8")
    (folder / _SETTINGS).write_text(json.dumps(values, indent=2) + "\n")
