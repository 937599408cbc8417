"""What one place, the command line or a YAML file, sets: values by field name, each checked and set once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from megatron_metro.config.errors import ConfigError
from megatron_metro.config.fields import Setting, Value, check_length, list_settings, parse_text, shorten
from megatron_metro.config.flags import SHORTHANDS, SPELLINGS, is_foreign_flag, judge_foreign_flag
from megatron_metro.config.legal import find_nearest
from megatron_metro.config.presets import PRESETS
from megatron_metro.config.schema import RunConfig
from megatron_metro.config.yaml_file import Entry, read_entries

Words = Sequence[str] | None  # what follows a flag or key; None is an explicit null


@dataclass(kw_only=True, slots=True)
class Source:
    """Collects settings. A label says in messages where one was found: the flag, or file, line and key."""

    preset: str | None = None
    config_path: str | None = None
    values: dict[str, Value] = field(default_factory=dict)
    shared_values: dict[str, Value] = field(default_factory=dict)  # from shorthands: a field set by itself wins
    labels: dict[str, str] = field(default_factory=dict)

    def list_values(self) -> dict[str, Value]:
        """All values by field name."""
        return {**self.shared_values, **self.values}

    def set_preset(self, label: str, words: Words) -> None:
        """Start from a named run."""
        self._claim("preset", label)
        name = words[0] if words else ""
        if name not in PRESETS:
            raise ConfigError(f"{label}: {shorten(name)} is not a preset; give one of {', '.join(PRESETS)}")
        self.preset = name

    def set_config_path(self, label: str, words: Words) -> None:
        """Read a YAML file."""
        self._claim("config", label)
        self.config_path = words[0] if words else ""

    def set_field(self, setting: Setting, label: str, words: Words) -> None:
        """Set a field to what `words` spell."""
        self.set_value(setting, label, parse_words(setting, label, words))

    def set_value(self, setting: Setting, label: str, value: Value) -> None:
        """Set a field to a value already checked."""
        self._claim(setting.name, label)
        self.values[setting.name] = value

    def set_spelling(self, flag: str, label: str, _: Words) -> None:
        """Set the field and value that a flag without a value stands for."""
        name, text = SPELLINGS[flag]
        self.set_field(list_settings()[name], label, (text,))

    def set_shorthand(self, flag: str, label: str, words: Words) -> None:
        """Set all fields of a shorthand that are not set by themselves."""
        self._claim(flag, label)
        for name in SHORTHANDS[flag]:
            self.shared_values[name] = parse_words(list_settings()[name], label, words)

    def _claim(self, key: str, label: str) -> None:
        if key in self.labels:
            earlier = self.labels[key]
            raise ConfigError(f"{label}: already set{'' if earlier == label else f' by {earlier}'}; set it once")
        self.labels[key] = label


def parse_words(setting: Setting, label: str, words: Words) -> Value:
    """The value of a field as words spell it."""
    if words is None:
        if not setting.is_list and not setting.is_optional:
            raise ConfigError(f"{label}: found no value; give one or leave the setting out")
        return () if setting.is_list else None
    values = tuple(parse_text(setting, word, label) for word in words)
    if setting.is_list:
        check_length(setting, values, label)
        return values
    if len(values) != 1:
        raise ConfigError(f"{label}: found {len(values)} values; give one")
    return values[0]


def read_sections(sections: object, label: str) -> dict[str, Value]:
    """The settings, by field name, that JSON of another run holds by section and name; each is checked.

    Settings it does not have keep their defaults. Raises ConfigError, whose text begins with `label`.
    """
    if not isinstance(sections, Mapping) or not all(isinstance(section, Mapping) for section in sections.values()):
        raise ConfigError(f"{label}: holds no sections of settings; give one that this program wrote")
    values: dict[str, Value] = {}
    for section, entries in sections.items():
        for name, value in entries.items():
            setting = list_settings().get(name)
            if setting is None or setting.section != section:
                found = shorten(f"{section}.{name}")
                raise ConfigError(f"{label}: {found} is no setting; use the program that wrote it")
            values[name] = parse_words(setting, f"{label}: {name}", _spell(value, f"{label}: {name}"))
    return values


def _spell(value: object, label: str) -> Words:
    """A JSON value as the words that a flag would have."""
    if value is None:
        return None
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, bool | int | float | str) for item in items):
        raise ConfigError(f"{label}: found a nested value; give one value or a flat list")
    return tuple(str(item).lower() if isinstance(item, bool) else str(item) for item in items)


def read_file(path: str) -> Source:
    """What a YAML file sets; raises ConfigError with the line."""
    source = Source()
    for entry in read_entries(path, tuple(section.name for section in fields(RunConfig))):
        _read_entry(source, entry)
    return source


def _read_entry(source: Source, entry: Entry) -> None:
    flag = "--" + entry.name.replace("_", "-")
    words = (entry.value,) if isinstance(entry.value, str) else entry.value
    settings = {spelling: setting for setting in list_settings().values() for spelling in setting.flags}
    if flag in settings:
        setting = settings[flag]
        if entry.section not in (None, setting.section):
            raise ConfigError(f"{entry.label} is not a setting of {entry.section}; move it to {setting.section}")
        source.set_field(setting, entry.label, words)
    elif flag == "--preset" and entry.section is None:
        source.set_preset(entry.label, words)
    elif flag in SHORTHANDS:
        source.set_shorthand(flag, entry.label, words)
    elif is_foreign_flag(flag):
        judge_foreign_flag(flag, entry.label, words)
    else:
        names = [spelling.removeprefix("--").replace("-", "_") for spelling in (*settings, *SHORTHANDS)]
        raise ConfigError(f"{entry.label} is not a setting; the nearest is {find_nearest(entry.name, names)}")
