"""Writes docs/flags.md from the dataclasses and the table of the original's flags: ``python -m megatron_bagel.config.flag_table``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from megatron_bagel.config.original_flags import ALIASES, ORIGINAL_FLAGS
from megatron_bagel.config.parser import SECTIONS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "flags.md"

_HEAD = """\
# Flags

<!-- Written by `python -m megatron_bagel.config.flag_table`; a test compares. Edit the dataclasses in megatron_bagel/config instead. -->

Every flag of `python -m megatron_bagel.train`. Each is accepted as `--x_y` and `--x-y`, by any unambiguous beginning, and as a key of the
YAML file given by `--config` (flat, or under `model:`, `data:`, `training:`, `megatron:`, `observing:`,
`resilience:`). Flags override the file. Unknown names are refused. Booleans take `True` / `False`, or stand bare for `True`.

The column *original* says what a flag of the original BAGEL is here: **as is** (same name, meaning and default), **becomes** (another
setting does its work), **refused** (values that cannot be honoured end the run at start-up, with the reason); empty for flags that the
original does not have.
"""

_TITLES = {
    "model": "Model", "data": "Data", "training": "Training", "megatron": "Megatron-Core (parallel layout, precision, memory)",
    "observing": "Observing",
    "resilience": "When something goes wrong",
}  # fmt: skip


def flag_table() -> str:
    """The whole document."""
    parts = [_HEAD]
    for section, arguments in SECTIONS.items():
        parts.append(f"## {_TITLES[section]}\n\n| flag | default | meaning | original |\n| --- | --- | --- | --- |")
        hints = get_type_hints(arguments)
        parts[-1] += "".join("\n" + _row(f, hints[f.name]) for f in fields(arguments)) + "\n"
    parts.append(_aliases())
    return "\n".join(parts)


def _row(setting: Field, hint: Any) -> str:
    meaning = setting.metadata["help"].removeprefix("Ours. ")
    choices = list(_choices(hint))
    if choices:
        meaning += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
    return f"| `--{setting.name}` | {_default(setting)} | {meaning.replace('|', '/')} | {_original(setting.name)} |"


def _choices(hint: Any) -> Iterator[str]:
    for argument in get_args(hint):
        if isinstance(argument, str):
            yield argument
        else:
            yield from _choices(argument)


def _default(setting: Field) -> str:
    value = setting.default if setting.default is not MISSING else setting.default_factory()
    return "–" if value in (None, []) else f"`{value}`"


def _original(name: str) -> str:
    fate = ORIGINAL_FLAGS.get(name)
    if fate is None:
        return ""
    word = {"honoured": "as is", "becomes": "**becomes**", "refused": "**refused**"}[fate.fate]
    return f"{word}: {fate.text}" if fate.text else word


def _aliases() -> str:
    rows = "".join(f"\n| `--{alias}` | `--{name}` |" for alias, name in ALIASES.items())
    return (
        "## Megatron's names for the original's flags\n\nBoth are accepted; giving both with different values is an error.\n\n"
        f"| Megatron | same as |\n| --- | --- |{rows}\n"
    )


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(flag_table(), encoding="utf-8")
    print(f"wrote {DOCUMENT}")
