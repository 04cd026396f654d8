"""From command line and YAML to one ``Config``: flags override the file, unknown names are refused with near matches.

YAML values go through the same conversions as words of the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megatron_bagel.config.arguments import DataArguments, ModelArguments, TrainingArguments
from megatron_bagel.config.flag import default_of
from megatron_bagel.config.flag_parser import build_parser, resolve_aliases, unknown_flag
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.observing_arguments import ObservingArguments
from megatron_bagel.config.paths import TYPED, expand_paths, with_absolute_paths
from megatron_bagel.config.record import write_record
from megatron_bagel.config.resilience_arguments import ResilienceArguments
from megatron_bagel.config.sections import ALIASES, SECTION_OF, SECTIONS, SETTINGS

CommandFlags = TypeVar("CommandFlags")


@dataclass
class Config:
    """Everything a run was asked for. ``given`` holds the names that were set by a flag or the file, not by a default."""

    model: ModelArguments = field(default_factory=ModelArguments)
    data: DataArguments = field(default_factory=DataArguments)
    training: TrainingArguments = field(default_factory=TrainingArguments)
    megatron: MegatronArguments = field(default_factory=MegatronArguments)
    observing: ObservingArguments = field(default_factory=ObservingArguments)
    resilience: ResilienceArguments = field(default_factory=ResilienceArguments)
    given: frozenset[str] = frozenset()

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Config:
        """From setting names to converted values; names that are absent keep their defaults."""
        sections = {
            section: arguments(**{name: value for name, value in values.items() if SECTION_OF[name] == section})
            for section, arguments in SECTIONS.items()
        }
        return cls(**sections, given=frozenset(values))

    def value_of(self, name: str) -> Any:
        """The value of a setting, by the name of its flag."""
        return getattr(getattr(self, SECTION_OF[name]), name)

    def to_dict(self) -> dict[str, Any]:
        """Sections of plain values, and the names that were given, which ``from_dict`` and ``--config`` read back."""
        return {**{section: asdict(getattr(self, section)) for section in SECTIONS}, "given": sorted(self.given)}

    def to_record(self) -> dict[str, Any]:
        """The same for a run to keep: paths are absolute, so that they mean the same from any folder."""
        return with_absolute_paths(self.to_dict())

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Config:
        """Inverse of ``to_dict``."""
        return _config_of(dict(content), "configuration")

    def save(self, path: str | Path) -> None:
        """Write as YAML that ``--config`` accepts, whole or not at all."""
        write_record(self.to_dict(), path)


def parse_config(arguments: Sequence[str], prog: str = "python -m megatron_bagel.train") -> Config:
    """The run's settings from command-line words (without the program's name).

    Raises ValueError for an unknown flag or key (with near matches), a value of the wrong type, a file that cannot be read,
    and two spellings of one setting with different values. Prints help and exits on ``--help``.
    """
    return _with_file(build_parser(None, prog).given_values(arguments, "command line"))


def parse_with(
    command_flags: type[CommandFlags], arguments: Sequence[str], prog: str = "python -m megatron_bagel.train"
) -> tuple[Config, CommandFlags]:
    """The same for a program with flags of its own, a dataclass: (the run's settings, the program's)."""
    command_class: type = command_flags
    values = build_parser(command_class, prog).given_values(arguments, "command line")
    own = {setting.name: values.pop(setting.name) for setting in fields(command_class) if setting.name in values}
    return _with_file(values), command_flags(**own)


def _with_file(values: dict[str, Any]) -> Config:
    path = values.pop("config", None)
    file_values = _file_values(Path(path)) if path is not None else {}
    return Config.from_values(expand_paths({**file_values, **values}))


def _file_values(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config: there is no file {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid YAML ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: expected keys and values, found a {type(content).__name__}")
    config = _config_of(content, str(path))
    # A value that differs from the default was given too: someone edited a file that a run had written.
    edited = {name for name, setting in SETTINGS.items() if config.value_of(name) != default_of(setting)}
    return {name: config.value_of(name) for name in config.given | edited}


def _config_of(content: dict[str, Any], source: str) -> Config:
    content = dict(content)
    content.pop(TYPED, None)  # the paths themselves are in their sections
    # Both are written by programs: settings that had their defaults, or values derived from others, were not given.
    given, derived = content.pop("given", None), content.pop("derived", None) or {}
    if not isinstance(derived, dict):
        raise ValueError(f"{source}: derived holds settings and their values, not a {type(derived).__name__}")
    flat = _flatten(content, source)
    for name in _known_names(derived, f"{source}: derived"):
        if flat.get(name) == derived[name] and name not in (given or ()):
            del flat[name]
    parser, words, empty = build_parser(), [], {}
    names = {action.dest for action in parser._actions} - {"help", "config"}
    for key, value in flat.items():
        name = key.replace("-", "_")
        if name not in names:
            raise ValueError(f"{source}: {unknown_flag('--' + name, sorted(names))}")
        if value is None or value == []:
            empty[name] = value
        else:
            # One word with "=": a value such as -2 is not taken for a flag.
            words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    values = {**parser.given_values(words, source), **resolve_aliases(_check_empty(empty, source), source)}
    config = Config.from_values(values)
    if given is not None:
        config.given = frozenset(_known_names(given, f"{source}: given"))
    return config


def _known_names(names: Any, source: str) -> list[str]:
    unknown = [name for name in names if name not in SECTION_OF]
    if unknown:
        raise ValueError(f"{source}: {unknown_flag(f'--{unknown[0]}', SECTION_OF)}")
    return list(names)


def _flatten(content: dict[str, Any], source: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        section = value if key in SECTIONS and isinstance(value, dict) else {key: value}
        for name, setting in section.items():
            if name in flat and flat[name] != setting:
                raise ValueError(f"{source}: {name} is set twice, to {flat[name]!r} and {setting!r}")
            if isinstance(setting, dict):
                raise ValueError(f"{source}: {name} holds a group of settings; groups are {', '.join(SECTIONS)}")
            flat[str(name)] = setting
    return flat


def _check_empty(empty: dict[str, Any], source: str) -> dict[str, Any]:
    """``null`` and ``[]`` have no spelling on the command line: allowed where they are the default."""
    for name, value in empty.items():
        if default_of(SETTINGS[ALIASES.get(name, name)]) != value:
            raise ValueError(f"{source}: {name} has no value")
    return empty
