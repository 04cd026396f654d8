# SPDX-License-Identifier: Apache-2.0
"""The definition of a flag: one dataclass field holds its default, help, origin, range and other names."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, get_args

from megatron_bagel.config.original_flags import AS_IS, Compatibility

#: Where a flag comes from: the original BAGEL, Megatron-Core, or this project.
Origin = Literal["original", "megatron", "new"]
#: What becomes of a setting that differs from the checkpoint's when a run resumes: the run is refused, or the log says so, or nothing.
OnResume = Literal["must match", "said", "free"]
MUST_MATCH: OnResume = "must match"
SAID: OnResume = "said"
FREE: OnResume = "free"
_KEY = "flag"


@dataclass(frozen=True)
class Range:
    """The numbers that a flag takes. ``minimum`` and ``maximum`` belong to the range, ``above`` and ``below`` do not."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        # Each comparison asks what must hold, so that NaN is in no range.
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __bool__(self) -> bool:
        return self != Range()

    def __str__(self) -> str:
        """The range in words, to follow "must be"."""
        if self == Range(minimum=0):
            return "0 or more"
        if self == Range(above=0):
            return "positive"
        if self.minimum is not None and self.maximum is not None:
            return f"between {self.minimum:g} and {self.maximum:g}"
        bounds = (("at least", self.minimum), ("above", self.above), ("at most", self.maximum), ("below", self.below))
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


@dataclass(frozen=True)
class Flag:
    """The properties of a flag besides the name, type and default of its field.

    Attributes:
        help: One or two sentences for ``--help`` and docs/flags.md.
        origin: Where the flag comes from.
        range: Numbers that the flag takes. An empty range takes all.
        choices: Words that the flag takes, for types that do not list them. A ``Literal`` lists its own.
        aliases: Other names of the same setting. Giving two names with different values is an error.
        compatibility: What a flag of the original means here.
        on_resume: What a resume does if the value differs from the checkpoint's.
    """

    help: str
    origin: Origin
    range: Range
    choices: tuple[str, ...]
    aliases: tuple[str, ...]
    compatibility: Compatibility
    on_resume: OnResume

    @classmethod
    def of(cls, setting: Field[Any]) -> Flag:
        """Return the properties of a field that ``flag`` made."""
        return setting.metadata[_KEY]


def flag(
    default: Any,
    help: str,
    *,
    on_resume: OnResume,
    origin: Origin = "new",
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    aliases: Sequence[str] = (),
    compatibility: Compatibility = AS_IS,
) -> Any:
    """Make a dataclass field that is a command-line flag, a YAML key and a row of docs/flags.md. See ``Flag`` and ``Range``.

    Every instance gets its own copy of a default that is a list. ``on_resume`` has no default, so that whoever adds a flag decides.
    """
    allowed = Range(minimum, maximum, above, below)
    metadata = {_KEY: Flag(help, origin, allowed, tuple(choices), tuple(aliases), compatibility, on_resume)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


original_flag = functools.partial(flag, origin="original")
#: A flag of a command that is no setting of a run.
command_flag = functools.partial(flag, on_resume=FREE)
megatron_flag = functools.partial(flag, origin="megatron")


def default_of(setting: Field[Any]) -> Any:
    """Return the value that a setting has when nobody gives it."""
    return setting.default_factory() if setting.default_factory is not MISSING else setting.default


def choices_of(setting: Field[Any], hint: Any) -> list[str]:
    """Return the words that a setting takes, from its metadata or the ``Literal`` in its type. An empty list means any word."""
    return list(Flag.of(setting).choices or _literals(hint))


def _literals(hint: Any) -> Iterator[str]:
    for argument in get_args(hint):
        if isinstance(argument, str):
            yield argument
        else:
            yield from _literals(argument)


def check_values(arguments: Any) -> None:
    """Check every value of a dataclass of flags against the range and the choices in its field.

    Raises:
        ValueError: for the first value outside its range or choices, with the flag, the value and what it takes.
    """
    for setting in fields(arguments):
        value, rules = getattr(arguments, setting.name), Flag.of(setting)
        if value is None:
            continue
        if rules.range and value not in rules.range:
            raise ValueError(f"--{setting.name} is {value}; it must be {rules.range}")
        words = value if isinstance(value, list) else [value]
        unknown_words = [word for word in words if rules.choices and word not in rules.choices]
        if unknown_words:
            raise ValueError(f"--{setting.name} {' '.join(unknown_words)}: choose from {', '.join(rules.choices)}")
