"""A run's YAML file as text values with line numbers: nothing is constructed, so nothing can be smuggled in.

Values stay the text that was written and are parsed as flags are (YAML 1.1 would read `4e-4` as a string and `no` as
false). Keys may be nested by section or flat, with dashes or underscores.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_metro.config.errors import ConfigError
from megatron_metro.config.fields import shorten

MAX_BYTES = 1_000_000
MAX_DEPTH = 3  # file, section, list

NULL_TAG = "tag:yaml.org,2002:null"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One key of the file: its name with underscores, and its text, list of texts, or None."""

    section: str | None
    name: str
    value: str | tuple[str, ...] | None
    label: str  # "run.yaml line 3: hidden_size"


def read_entries(path: str, sections: tuple[str, ...]) -> tuple[Entry, ...]:
    """All entries in the order of the file; raises ConfigError with file and line for anything but plain settings."""
    text = _read_text(path)
    try:
        _check_events(path, text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path} line {mark.line + 1}" if mark else path
        problem = getattr(error, "problem", None) or getattr(error, "reason", "unknown problem")
        raise ConfigError(f"{where}: not valid YAML ({problem}); fix the line") from None
    if root is None:
        return ()
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: found no `key: value` lines; write one setting per line")
    entries: list[Entry] = []
    for key, node in root.value:
        name = _read_key(path, key)
        if isinstance(node, yaml.MappingNode):
            if name not in sections:
                raise ConfigError(
                    f"{_locate(path, key)}: {shorten(name)} is not a section; sections are {', '.join(sections)}"
                )
            entries += [_read_entry(path, name, inner_key, inner) for inner_key, inner in node.value]
        elif not (name in sections and _is_null(node)):  # a section without any setting in it
            entries.append(_read_entry(path, None, key, node))
    return tuple(entries)


def _read_text(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"--config {path}: the file is larger than {MAX_BYTES} bytes; give a file of settings")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}); give a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _check_events(path: str, text: str) -> None:
    """Refuse deep nesting, anchors, aliases and tags before any node is built."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{path} line {event.start_mark.line + 1}"
        if getattr(event, "anchor", None) is not None:
            raise ConfigError(f"{where}: found an anchor or alias; write the value out")
        if getattr(event, "tag", None) is not None:
            raise ConfigError(f"{where}: found the tag {shorten(event.tag)}; write the plain value")
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            depth += 1
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise ConfigError(f"{where}: nested too deeply; settings stand at the top or one level down in a section")


def _read_entry(path: str, section: str | None, key: yaml.Node, node: yaml.Node) -> Entry:
    name = _read_key(path, key)
    label = f"{_locate(path, key)}: {name}"
    if isinstance(node, yaml.ScalarNode):
        value = None if _is_null(node) else node.value
    elif isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        value = tuple(item.value for item in node.value)
    else:
        raise ConfigError(f"{label}: found a nested value; give one value or a flat list")
    return Entry(section=section, name=name, value=value, label=label)


def _read_key(path: str, key: yaml.Node) -> str:
    if not isinstance(key, yaml.ScalarNode):
        raise ConfigError(f"{_locate(path, key)}: a key must be the name of a setting")
    return str(key.value).replace("-", "_")


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == NULL_TAG


def _locate(path: str, node: yaml.Node) -> str:
    return f"{path} line {node.start_mark.line + 1}"
