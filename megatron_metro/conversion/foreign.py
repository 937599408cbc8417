"""What every Hugging Face format consists of, and how its folders are read and written; the formats fill it in."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_metro.config.errors import CheckpointError, ConfigError
from megatron_metro.config.fields import Value, change_values, shorten
from megatron_metro.config.schema import ModelConfig, RunConfig
from megatron_metro.config.validation import resolve, validate
from megatron_metro.conversion.mapping import Rule
from megatron_metro.conversion.tensor_files import open_folder, read_json, write_folder
from megatron_metro.conversion.tokenizer_files import open_tokenizer, read_tokenizer, write_tokenizer
from megatron_metro.conversion.weights import MappedWeights, Source, SplitWeights, TensorFile

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
_MAX_COUNT = 2**31 - 1


class Fields:
    """The settings of a config.json by name, each of the kind that is asked for. All methods raise CheckpointError.

    Without a default a setting must be there.
    """

    def __init__(self, place: Path, values: Mapping[str, Any]) -> None:
        self.place = place
        self._values = values

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number from 1 on."""
        value = self._get(name, default)
        if type(value) is not int or not 0 < value <= _MAX_COUNT:
            raise self._refuse(name, value, "a whole number above 0")
        return value

    def number(self, name: str, default: float) -> float:
        """A number."""
        value = self._get(name, default)
        if type(value) not in (int, float):
            raise self._refuse(name, value, "a number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if type(value) is not bool:
            raise self._refuse(name, value, "true or false")
        return value

    def choice(self, name: str, known: Mapping[str, str], default: str) -> Any:
        """Our word for one of theirs."""
        value = self._get(name, default)
        if type(value) is not str or value not in known:
            raise self._refuse(name, value, f"one of {', '.join(known)}, which this program has")
        return known[value]

    def require(self, name: str, expected: Any) -> None:
        """Refuse any other value of a setting that this program has no place for; it may be missing."""
        value = self._get(name, expected)
        if value != expected:
            raise self._refuse(name, value, f"{expected}, which this program has")

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is None and default is None:
            raise CheckpointError(f"{self.place}: has no {name}; give the configuration of a model of this format")
        return default if value is None else value

    def _refuse(self, name: str, value: Any, expected: str) -> CheckpointError:
        shown = shorten(value) if isinstance(value, bool | int | float | str) else f"a {type(value).__name__}"
        return CheckpointError(f"{self.place}: {name} is {shown}, not {expected}; give another model")


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreign:
    """A Hugging Face format. All functions raise CheckpointError or ConfigError."""

    name: str  # of --from and --to
    model_type: str
    read_run: Callable[[Fields, TensorFile], RunConfig]
    name_weights: Callable[[ModelConfig], list[Rule]]
    write_config: Callable[[RunConfig], dict[str, Any]]
    ignored: Sequence[str] = ()  # tensors that files may hold and nothing reads
    has_t5_ids: bool = False  # where no tokenizer says otherwise: pad 0 and </s> 1 rather than 1 and 2


def read_folder(form: Foreign, folder: Path, settings: Mapping[str, Value]) -> Source:
    """The model in a folder; `settings`, by field name, win over what its files say.

    Raises CheckpointError where files are missing, damaged or do not belong together, UnsafeError where one asks for
    anything that would run code, ConfigError where the settings describe no model or name another tokenizer.
    """
    if not folder.is_dir():
        raise CheckpointError(f"--input {folder}: is no folder; give the one that holds {CONFIG}")
    fields = Fields(folder / CONFIG, read_json(folder / CONFIG))
    fields.require("model_type", form.model_type)
    tensors = open_folder(folder)
    run = form.read_run(fields, tensors)
    own = read_tokenizer(folder, run.tokenizer)
    own_run = complete_run(replace(run, tokenizer=own), settings)
    weights = MappedWeights(tensors, form.name_weights(own_run.model), own_run.model, folder, form.ignored)
    sha256 = None
    if own.tokenizer_model is not None and "tokenizer_model" in settings:
        found = open_tokenizer(replace(own_run, tokenizer=own))
        sha256 = None if found is None else found.sha256
    return Source(run=own_run, weights=weights, place=folder, tokenizer=open_tokenizer(own_run, sha256))


def complete_run(run: RunConfig, settings: Mapping[str, Value]) -> RunConfig:
    """A run with settings that a user gave, resolved for one process and legal. Raises ConfigError."""
    # What a decoder writes follows from what else is set.
    run = resolve(change_values(run, {"decoder_seq_length": None, **settings}), 1)
    validate(run, 1)
    return run


def write_files(form: Foreign, source: Source, folder: Path) -> None:
    """Write a model's weights, configuration and tokenizer into an empty folder. Raises ConfigError, OSError."""
    config = form.write_config(source.run)
    split = SplitWeights(source.weights, form.name_weights(source.run.model))
    shapes = split.list_shapes()
    dtypes = {str(dtype).removeprefix("torch.") for _, dtype in shapes.values()}
    ids = _list_ids(form, source)
    config |= {**ids, "torch_dtype": dtypes.pop() if len(dtypes) == 1 else "float32"}
    write_folder(folder, shapes, split)
    for name, values in ((CONFIG, config), (GENERATION_CONFIG, ids)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    if source.tokenizer is not None:
        write_tokenizer(source.tokenizer, source.run.tokenizer, folder)


def _list_ids(form: Foreign, source: Source) -> dict[str, int]:
    """What generation starts and ends with: T5's decoder begins with pad, METRO's with </s>."""
    if source.tokenizer is not None:
        pad, end = source.tokenizer.pad_id, source.tokenizer.eos_id
        start = pad if source.tokenizer.vocabulary.is_t5 else end
    else:
        pad, end, start = (0, 1, 0) if form.has_t5_ids else (1, 2, 2)
    return {"pad_token_id": pad, "eos_token_id": end, "decoder_start_token_id": start}


def require_settings(model: ModelConfig, expected: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError, naming the flag, where a model differs from what every model of a format is."""
    for field, value in expected.items():
        found = getattr(model, field)
        if found != value:
            raise ConfigError(
                f"--to {name}: its models have --{field.replace('_', '-')} {value}, this one has {found}; export it to "
                "a format that has it"
            )
