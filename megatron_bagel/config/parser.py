"""From command line and YAML to one ``Config``: flags override the file, unknown names are refused with near matches.

The flags are made by transformers' HfArgumentParser, as in the original: ``--x_y`` and ``--x-y``, unambiguous beginnings, and
booleans as ``True`` / ``False`` or bare. YAML values go through the same conversions.
"""

from __future__ import annotations

import argparse
import difflib
import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from megatron_bagel.config.arguments import DataArguments, ModelArguments, TrainingArguments
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.observing_arguments import ObservingArguments
from megatron_bagel.config.original_flags import ALIASES
from megatron_bagel.config.record import write_record
from megatron_bagel.config.resilience_arguments import ResilienceArguments

SECTIONS: dict[str, type] = {
    "model": ModelArguments, "data": DataArguments, "training": TrainingArguments, "megatron": MegatronArguments,
    "observing": ObservingArguments, "resilience": ResilienceArguments,
}  # fmt: skip
Beside = TypeVar("Beside")
SECTION_OF: dict[str, str] = {f.name: section for section, arguments in SECTIONS.items() for f in fields(arguments)}


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
        parts = {
            section: arguments(**{name: value for name, value in values.items() if SECTION_OF[name] == section})
            for section, arguments in SECTIONS.items()
        }
        return cls(**parts, given=frozenset(values))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Sections of plain values, and the names that were given, which ``from_dict`` and ``--config`` read back."""
        return {**{section: asdict(getattr(self, section)) for section in SECTIONS}, "given": sorted(self.given)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Config:
        """Inverse of ``to_dict``."""
        return _config_of(dict(content), "configuration")

    def save(self, path: str | Path) -> None:
        """Write as YAML that ``--config`` accepts, whole or not at all."""
        write_record(self.to_dict(), path)


class _Parser(HfArgumentParser):
    """Raises ValueError where argparse would print its usage and leave, and sets only what is given."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"command line: {message}")

    def given_values(self, arguments: Sequence[str], where: str) -> dict[str, Any]:
        """Setting name -> value of every setting in ``arguments``, aliases resolved."""
        try:
            namespace, unknown = self.parse_known_args(list(arguments))
        except ValueError as error:
            raise ValueError(str(error).replace("command line", where, 1)) from None
        if unknown:
            raise ValueError(f"{where}: {_unknown(unknown[0], self._option_string_actions)}")
        return _resolve_aliases(vars(namespace), where)


def _unknown(text: str, options: Sequence[str]) -> str:
    if not text.startswith("--"):
        return f"{text!r} belongs to no flag"
    name = text.split("=", 1)[0].replace("-", "_").lstrip("_")
    near = difflib.get_close_matches(name, {option.lstrip("-").replace("-", "_") for option in options}, n=3, cutoff=0.6)
    return f"there is no flag --{name}" + (f"; did you mean {', '.join('--' + match for match in near)}?" if near else "; see --help")


def _resolve_aliases(values: dict[str, Any], where: str) -> dict[str, Any]:
    resolved = {name: value for name, value in values.items() if name not in ALIASES}
    for alias, name in ALIASES.items():
        if alias not in values:
            continue
        if name in resolved and resolved[name] != values[alias]:
            raise ValueError(f"{where}: --{alias} {values[alias]} and --{name} {resolved[name]} are one setting; give one of them")
        resolved[name] = values[alias]
    return resolved


@functools.cache
def build_parser(beside: type | None = None, prog: str = "python -m megatron_bagel.train") -> argparse.ArgumentParser:
    """All flags, their aliases and ``--config``, and those of the dataclass ``beside``. Nothing has a default here: what is absent was
    not given."""
    parser = _Parser(
        [*SECTIONS.values(), *([beside] if beside is not None else [])],
        prog=prog,
        description="Train a BAGEL model. Every flag is also a key of the YAML file given by --config; flags override the file.",
    )
    actions = {action.dest: action for action in parser._actions if not action.option_strings[0].startswith("--no_")}
    defaults = {f.name: f for arguments in (*SECTIONS.values(), *([beside] if beside is not None else [])) for f in fields(arguments)}
    for alias, name in ALIASES.items():
        same = actions[name]
        spellings = dict.fromkeys([f"--{alias}", f"--{alias.replace('_', '-')}"])
        parser.add_argument(*spellings, dest=alias, type=same.type, choices=same.choices, help=f"Megatron's name of --{name}.")
    parser.add_argument("--config", help=f"YAML file with any of these settings, flat or under {':, '.join(SECTIONS)}:.")
    for action in parser._actions:
        if action.dest in defaults and action.help and action.dest == action.option_strings[0].lstrip("-"):
            action.help = f"{action.help.replace('%', '%%')} (default: {_default_text(defaults[action.dest])})"
        if action.type is string_to_bool and action.nargs is None:  # HfArgumentParser wants a value after a flag of type bool | None
            action.nargs, action.const = "?", True
        if action.dest != "help":
            action.default = argparse.SUPPRESS
    return parser


def _default_text(setting: Any) -> str:
    value = setting.default_factory() if callable(setting.default_factory) else setting.default
    return "none" if value in (None, []) else str(value)


def parse_config(arguments: Sequence[str], prog: str = "python -m megatron_bagel.train") -> Config:
    """The run's settings from command-line words (without the program's name).

    Raises ValueError for an unknown flag or key (with near matches), a value of the wrong type, a file that cannot be read,
    and two spellings of one setting with different values. Prints help and exits on ``--help``.
    """
    return _config_from(build_parser(None, prog).given_values(arguments, "command line"))


def parse_with(beside: type[Beside], arguments: Sequence[str], prog: str) -> tuple[Config, Beside]:
    """The same for a program with flags of its own, a dataclass: (the run's settings, the program's)."""
    values = build_parser(beside, prog).given_values(arguments, "command line")
    own = {f.name: values.pop(f.name) for f in fields(beside) if f.name in values}
    return _config_from(values), beside(**own)


def _config_from(values: dict[str, Any]) -> Config:
    path = values.pop("config", None)
    from_file = _file_values(Path(path)) if path is not None else {}
    return Config.from_values({**from_file, **values})


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
    return {name: getattr(getattr(config, SECTION_OF[name]), name) for name in config.given}


def _config_of(content: dict[str, Any], where: str) -> Config:
    flat = _flatten(dict(content), where)
    # Written by save(): settings that were defaults there stay defaults.
    given = flat.pop("given", None)
    parser, words, empty = build_parser(), [], {}
    names = {action.dest for action in parser._actions} - {"help", "config"}
    for key, value in flat.items():
        name = key.replace("-", "_")
        if name not in names:
            raise ValueError(f"{where}: {_unknown('--' + name, sorted(names))}")
        if value is None or value == []:
            empty[name] = value
        else:
            # One word with "=": a value such as -2 is not taken for a flag.
            words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    values = {**parser.given_values(words, where), **_resolve_aliases(_check_empty(empty, where), where)}
    config = Config.from_values(values)
    if given is not None:
        config.given = frozenset(given)
    return config


def _flatten(content: dict[str, Any], where: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        part = value if key in SECTIONS and isinstance(value, dict) else {key: value}
        for name, setting in part.items():
            if name in flat and flat[name] != setting:
                raise ValueError(f"{where}: {name} is set twice, to {flat[name]!r} and {setting!r}")
            if isinstance(setting, dict):
                raise ValueError(f"{where}: {name} holds a group of settings; groups are {', '.join(SECTIONS)}")
            flat[str(name)] = setting
    return flat


def _check_empty(empty: dict[str, Any], where: str) -> dict[str, Any]:
    """``null`` and ``[]`` have no spelling on the command line: allowed where they are the default."""
    allowed = Config()
    for name, value in empty.items():
        canonical = ALIASES.get(name, name)
        if getattr(getattr(allowed, SECTION_OF[canonical]), canonical) != value:
            raise ValueError(f"{where}: {name} has no value")
    return empty
