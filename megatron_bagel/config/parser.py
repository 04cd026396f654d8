# SPDX-License-Identifier: Apache-2.0
"""The way from command line and YAML file to one ``Config``. Flags override the file; unknown names are refused with near matches.

YAML values go through the same conversions as words of the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from megatron_bagel.common.paths import expanded_path
from megatron_bagel.common.yaml_files import read_yaml
from megatron_bagel.config.arguments import DataArguments, ModelArguments, TrainingArguments
from megatron_bagel.config.flag import default_of
from megatron_bagel.config.flag_parser import build_parser, resolve_aliases, unknown_flag
from megatron_bagel.config.lora_arguments import LoraArguments
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.observing_arguments import ObservingArguments
from megatron_bagel.config.paths import COMMAND_PATHS, TYPED, expand_paths, with_absolute_paths, with_hub_names
from megatron_bagel.config.record import write_record
from megatron_bagel.config.resilience_arguments import ResilienceArguments
from megatron_bagel.config.sections import ALIASES, SECTION_OF, SECTIONS, SETTINGS

CommandFlags = TypeVar("CommandFlags")


@dataclass
class Config:
    """All settings of a run as the user gave them.

    ``given`` holds the names that a flag or the file set, not a default. ``hub_names`` holds the models on a hub, with their commits, that
    settings named before a folder of the cache took their place.
    """

    model: ModelArguments = field(default_factory=ModelArguments)
    data: DataArguments = field(default_factory=DataArguments)
    training: TrainingArguments = field(default_factory=TrainingArguments)
    megatron: MegatronArguments = field(default_factory=MegatronArguments)
    lora: LoraArguments = field(default_factory=LoraArguments)
    observing: ObservingArguments = field(default_factory=ObservingArguments)
    resilience: ResilienceArguments = field(default_factory=ResilienceArguments)
    given: frozenset[str] = frozenset()
    hub_names: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Config:
        """Make a configuration from converted values by name. Names that are absent keep their defaults."""
        sections = {
            section: arguments(**{name: value for name, value in values.items() if SECTION_OF[name] == section})
            for section, arguments in SECTIONS.items()
        }
        return cls(**sections, given=frozenset(values))

    def value_of(self, name: str) -> Any:
        """Return the value of a setting, by the name of its flag."""
        return getattr(getattr(self, SECTION_OF[name]), name)

    def to_dict(self) -> dict[str, Any]:
        """Return sections of plain values, and the names that were given. ``from_dict`` and ``--config`` read them back."""
        return {**{section: asdict(getattr(self, section)) for section in SECTIONS}, "given": sorted(self.given)}

    def to_record(self) -> dict[str, Any]:
        """The same for a run to keep: paths are absolute, so that they mean the same from any folder."""
        return with_absolute_paths(self.to_dict(), self.hub_names)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Config:
        """Read what ``to_dict`` returned."""
        return _config_of(dict(content), "configuration")

    def save(self, path: str | Path) -> None:
        """Write the configuration as YAML that ``--config`` accepts, whole or not at all."""
        write_record(self.to_dict(), path)


def parse_config(arguments: Sequence[str], prog: str = "python -m megatron_bagel.train") -> Config:
    """Return the settings that a command line gives. ``--help`` prints help and exits.

    Args:
        arguments: Words of the command line, without the program's name.
        prog: Name of the program in help and errors.

    Raises:
        ValueError: for an unknown flag or key (with near matches), a value of the wrong type, a file that cannot be read, and
            two names of one setting with different values.
    """
    return _with_file(build_parser(None, prog).given_values(arguments, "command line"))


def parse_with(
    command_flags: type[CommandFlags], arguments: Sequence[str], prog: str = "python -m megatron_bagel.train"
) -> tuple[Config, CommandFlags]:
    """Return the settings of a run, and those of a command with a dataclass of flags of its own. Raises like ``parse_config``."""
    command_class: type = command_flags
    values = build_parser(command_class, prog).given_values(arguments, "command line")
    command_values = {setting.name: values.pop(setting.name) for setting in fields(command_class) if setting.name in values}
    return _with_file(values), command_flags(**expand_paths(command_values, COMMAND_PATHS))


def _with_file(values: dict[str, Any]) -> Config:
    path = values.pop("config", None)
    file_values = _file_values(Path(expanded_path(path, "--config"))) if path is not None else {}
    return Config.from_values(expand_paths({**file_values, **values}))


def _file_values(path: Path) -> dict[str, Any]:
    content = read_yaml(path, "--config") or {}
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: expected keys and values, found a {type(content).__name__}")
    config = _config_of(content, str(path))
    # A value that differs from the default counts as given: someone edited a file that a run had written.
    edited_names = {name for name, setting in SETTINGS.items() if config.value_of(name) != default_of(setting)}
    return {name: config.value_of(name) for name in config.given | edited_names}


def _config_of(content: dict[str, Any], source: str) -> Config:
    content = with_hub_names(content)
    content.pop(TYPED, None)  # the paths themselves are in their sections
    # Programs write both keys: settings with their defaults, and values derived from others, were not given.
    given, derived = content.pop("given", None), content.pop("derived", None) or {}
    if not isinstance(derived, dict):
        raise ValueError(f"{source}: derived holds settings and their values, not a {type(derived).__name__}")
    flat_values = _flatten(content, source)
    for name in _known_names(derived, f"{source}: derived"):
        if flat_values.get(name) == derived[name] and name not in (given or ()):
            del flat_values[name]
    parser, words, empty_values = build_parser(), [], {}
    names = {action.dest for action in parser._actions} - {"help", "config"}
    for key, value in flat_values.items():
        name = key.replace("-", "_")
        if name not in names:
            raise ValueError(f"{source}: {unknown_flag('--' + name, sorted(names))}")
        if value is None or value == []:
            empty_values[name] = value
        else:
            # One word with "=": a value such as -2 is not taken for a flag.
            words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    values = {**parser.given_values(words, source), **resolve_aliases(_check_empty(empty_values, source), source)}
    config = Config.from_values(values)
    if given is not None:
        config.given = frozenset(_known_names(given, f"{source}: given"))
    return config


def _known_names(names: Any, source: str) -> list[str]:
    unknown_names = [name for name in names if name not in SECTION_OF]
    if unknown_names:
        raise ValueError(f"{source}: {unknown_flag(f'--{unknown_names[0]}', SECTION_OF)}")
    return list(names)


def _flatten(content: dict[str, Any], source: str) -> dict[str, Any]:
    flat_values: dict[str, Any] = {}
    for key, value in content.items():
        section = value if key in SECTIONS and isinstance(value, dict) else {key: value}
        for name, setting in section.items():
            if name in flat_values and flat_values[name] != setting:
                raise ValueError(f"{source}: {name} is set twice, to {flat_values[name]!r} and {setting!r}")
            if isinstance(setting, dict):
                raise ValueError(f"{source}: {name} holds a group of settings; groups are {', '.join(SECTIONS)}")
            flat_values[str(name)] = setting
    return flat_values


def _check_empty(empty_values: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the settings whose value is ``null`` or ``[]``, which only a default may be. Neither has a spelling on the command line."""
    for name, value in empty_values.items():
        if default_of(SETTINGS[ALIASES.get(name, name)]) != value:
            raise ValueError(f"{source}: {name} has no value")
    return empty_values
