"""Flags, YAML file and preset to one checked RunConfig, and back to a dump and a file."""

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megatron_metro.config.errors import ConfigError
from megatron_metro.config.fields import Setting, Value, change_values, list_settings, read_value
from megatron_metro.config.files import write_atomically
from megatron_metro.config.flags import SHORTHANDS, SPELLINGS, judge_foreign_flag, list_foreign_flags
from megatron_metro.config.parser import Parser, refuse_unknown
from megatron_metro.config.presets import PRESETS
from megatron_metro.config.schema import CheckpointConfig, RunConfig
from megatron_metro.config.source import Source, read_file
from megatron_metro.config.terms import follow_objective
from megatron_metro.config.validation import replica_size, resolve, validate

DESCRIPTION = """\
Every setting of a run is one flag with Megatron's name and meaning. Flags win over --config, which wins over --preset.
Each switch has a --no-x form; the word none unsets a value that may be missing. Flags of Megatron that are not listed
here are ignored with a warning or refused with the reason. Integers are digits, numbers look like 0.1 or 4e-4."""

# Called with where a run starts: the settings by field name of the run that saved it, and whether this one goes on.
ReadSaved = Callable[[CheckpointConfig], tuple[Mapping[str, Value], bool]]
ReadWords = Callable[[str, list[str]], None]  # called with the spelling of a flag and the words after it

# What --use-checkpoint-opt-param-scheduler takes, as in Megatron.
_SCHEDULE = (
    *("lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_warmup_iters", "lr_warmup_style"),
    "weight_decay",
)
# What a new run may choose for itself, whatever its checkpoint was trained with.
_CHOSEN_ANEW = {"hidden_dropout", "attention_dropout", "encoder_seq_length", "decoder_seq_length"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """What a tool says of the flags of a run, and their values where neither flags nor a preset give any."""

    description: str = DESCRIPTION
    start: RunConfig = field(default_factory=RunConfig)


_PLAIN_TOOL = Tool()


def parse_run(
    argv: Sequence[str],
    world_size: int | None,
    tool_flags: Sequence[str] = (),
    read_saved: ReadSaved | None = None,
    tool: Tool = _PLAIN_TOOL,
) -> RunConfig:
    """The resolved, valid run that flags describe for `world_size` processes, or for one replica of the model.

    `tool_flags` are those of a tool that took them out of `argv`: a misspelt one is told from a run's. `read_saved`
    finds what --use-checkpoint-args and --use-checkpoint-opt-param-scheduler ask for. Raises ConfigError, one line.
    """
    config = read_run(argv, tool_flags, read_saved, tool)
    if world_size is None:
        world_size = replica_size(config.parallel)
    config = resolve(config, world_size)
    validate(config, world_size)
    return config


def read_run(
    argv: Sequence[str],
    tool_flags: Sequence[str] = (),
    read_saved: ReadSaved | None = None,
    tool: Tool = _PLAIN_TOOL,
) -> RunConfig:
    """The run that flags describe, each value checked by itself; neither resolved nor validated."""
    flags = _read_flags(argv, tool_flags, tool)
    file = Source() if flags.config_path is None else read_file(flags.config_path)
    preset = flags.preset or file.preset
    return _merge(tool.start if preset is None else PRESETS[preset](), file, flags, read_saved=read_saved)


def read_settings(argv: Sequence[str], tool_flags: Sequence[str] = ()) -> dict[str, Value]:
    """The settings, by field name, that flags give, each value checked by itself; no preset and no file.

    Raises ConfigError.
    """
    source = _read_flags(argv, tool_flags, _PLAIN_TOOL)
    for flag, value in (("--preset", source.preset), ("--config", source.config_path)):
        if value is not None:
            raise ConfigError(f"{flag} {value} describes a whole run; give single settings")
    return source.list_values()


def load_config(path: str | Path) -> RunConfig:
    """The run that a YAML file describes: the same again for a file that `save_config` wrote."""
    file = read_file(str(path))
    return _merge(RunConfig() if file.preset is None else PRESETS[file.preset](), file)


def _merge(start: RunConfig, *sources: Source, read_saved: ReadSaved | None = None) -> RunConfig:
    """The start, a preset or defaults, changed by each source in turn; what nobody chose follows the objective."""
    config = start
    for source in sources:
        config = change_values(config, source.list_values())
    chosen = {name for source in sources for name in source.list_values()}
    checkpoint = config.checkpoint
    if read_saved is not None and (checkpoint.use_checkpoint_args or checkpoint.use_checkpoint_opt_param_scheduler):
        if checkpoint.load is None and checkpoint.pretrained_checkpoint is None:
            raise ConfigError(
                "--pretrained-checkpoint: there is no checkpoint to take the model from (--use-checkpoint-args); give "
                "the folder of a run, or --load FOLDER to go on with it"
            )
        saved, goes_on = read_saved(checkpoint)
        if checkpoint.use_checkpoint_args:
            config = _follow_checkpoint(config, chosen, saved, goes_on=goes_on)
        if checkpoint.use_checkpoint_opt_param_scheduler and goes_on:
            config = change_values(config, {name: saved[name] for name in _SCHEDULE})
    return follow_objective(config, start, chosen)


def _follow_checkpoint(
    config: RunConfig, chosen: Collection[str], saved: Mapping[str, Value], *, goes_on: bool
) -> RunConfig:
    """The run with the architecture, tokenizer and lengths that a checkpoint was saved with.

    The tokenizer's file may have moved, what a decoder writes follows from the objective, and lengths and dropout of
    a new run are its own: there flags win.
    """
    names = [name for name, setting in list_settings().items() if setting.section in ("model", "tokenizer")]
    names += ["encoder_seq_length", "decoder_seq_length"]
    if config.objective.objective != saved.get("objective"):
        names.remove("decoder_seq_length")
    if "tokenizer_model" in chosen:
        names.remove("tokenizer_model")
    if "generator_num_layers" in chosen and saved.get("objective") == "spactor":
        names.remove("generator_num_layers")  # its second stage has none
    if not goes_on:
        names = [name for name in names if name not in _CHOSEN_ANEW or name not in chosen]
    values = {name: saved[name] for name in names if name in saved}
    for name in values.keys() & set(chosen):
        setting = list_settings()[name]
        if (found := read_value(config, setting)) != values[name]:
            raise ConfigError(
                f"{setting.flag} {found} contradicts --use-checkpoint-args, whose checkpoint has {values[name]}; "
                f"drop {setting.flag} or --use-checkpoint-args"
            )
    return change_values(config, values)


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write a run as YAML, atomically, so that `--config` gives back the same run; raises StorageError."""
    sections: dict[str, dict[str, Any]] = {}
    for setting in list_settings().values():
        value = read_value(config, setting)
        sections.setdefault(setting.section, {})[setting.name] = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=float("inf"))
    write_atomically(Path(path), text.encode())


def format_config(config: RunConfig) -> str:
    """Megatron's dump of arguments: dotted, sorted without regard to case, between rulers."""
    lines = [
        f"  {name} {'.' * (48 - len(name))} {read_value(config, setting)}" for name, setting in list_settings().items()
    ]
    opening, closing = (f" {title} ".center(66, "-") for title in ("arguments", "end of arguments"))
    return "\n".join([opening, *sorted(lines, key=str.lower), closing])


class _Collect(argparse.Action):
    """Passes the spelling of a flag and the words after it on."""

    def __init__(self, *, read: ReadWords, **options: Any) -> None:
        super().__init__(**options)
        self.read = read

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        assert option_string is not None
        self.read(option_string, [values] if isinstance(values, str) else list(values))


def _read_flags(argv: Sequence[str], tool_flags: Sequence[str], tool: Tool) -> Source:
    source = Source()
    _, unknown = _build_parser(source, tool).parse_known_args(list(argv))
    if unknown:
        known = [spelling for setting in list_settings().values() for spelling in (*setting.flags, *setting.negatives)]
        refuse_unknown(unknown, [*known, *SHORTHANDS, *SPELLINGS, "--preset", "--config", *tool_flags])
    return source


def _build_parser(source: Source, tool: Tool) -> Parser:
    """A parser that fills `source`; flags are grouped by section so that --help reads from top to bottom."""
    parser = Parser(
        usage="%(prog)s [--preset NAME] [--config run.yaml] [flags]",
        description=tool.description,
        epilog="presets:\n" + "\n".join(f"  {name:15s}{make.__doc__}" for name, make in PRESETS.items()),
    )
    bases = parser.add_argument_group("start", "Where the values of flags that are not given come from.")
    bases.add_argument(
        "--preset", metavar="NAME", action=_Collect, read=source.set_preset, help="a named run, listed at the end"
    )
    bases.add_argument(
        "--config",
        metavar="FILE",
        action=_Collect,
        read=source.set_config_path,
        help="settings in YAML, by section or flat",
    )
    for section in fields(RunConfig):
        group = parser.add_argument_group(section.name, type(section.default).__doc__)
        for setting in list_settings().values():
            if setting.section == section.name:
                group.add_argument(
                    *setting.flags,
                    *setting.negatives,
                    action=_Collect,
                    read=partial(_read_setting, source, setting),
                    help=_describe(setting, read_value(tool.start, setting)),
                    **_describe_words(setting),
                )
    hidden: list[tuple[str, ReadWords, int | str | None]] = [
        *((flag, partial(source.set_shorthand, flag), None) for flag in SHORTHANDS),
        *((flag, partial(source.set_spelling, flag), 0) for flag in SPELLINGS),
        *((flag, partial(judge_foreign_flag, flag), "*") for flag in list_foreign_flags()),
    ]
    for flag, read, nargs in hidden:
        parser.add_argument(flag, action=_Collect, read=read, nargs=nargs, help=argparse.SUPPRESS)
    return parser


def _read_setting(source: Source, setting: Setting, flag: str, words: list[str]) -> None:
    if setting.kind is bool:
        source.set_value(setting, flag, flag not in setting.negatives)
    else:
        is_unset = words == ["none"] and (setting.is_list or setting.is_optional)
        source.set_field(setting, flag, None if is_unset else words)


def _describe(setting: Setting, default: Value) -> str:
    if setting.kind is bool:
        default = "on" if default else "off"
    elif default in (None, ()):
        default = "none"
    return f"{setting.metadata['help']} (default: {default})".replace("%", "%%")


def _describe_words(setting: Setting) -> Mapping[str, Any]:
    if setting.kind is bool:
        return {"nargs": 0}
    word = {int: "N", float: "X", str: "TEXT"}[setting.kind]
    if setting.choices:
        word = "{" + ",".join(setting.choices) + "}"
    return {"nargs": (setting.length or "+") if setting.is_list else None, "metavar": word}
