# SPDX-License-Identifier: Apache-2.0
"""The page docs/flags.md, written from the dataclasses of flags by ``python -m megatron_bagel.config.flag_table``."""

from __future__ import annotations

from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_type_hints

from megatron_bagel.config.flag import Flag, choices_of, default_of
from megatron_bagel.config.plan_arguments import PrintArguments
from megatron_bagel.config.sections import ALIASES, SECTIONS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "flags.md"

_HEAD = """\
# Flags

<!-- Written by `python -m megatron_bagel.config.flag_table`; a test compares. Edit the dataclasses in megatron_bagel/config instead. -->

Every flag of `python -m megatron_bagel.train`. Each is accepted as `--x_y` and `--x-y`, by any unambiguous beginning, and as a key of the
YAML file given by `--config` (flat, or under `model:`, `data:`, `training:`, `megatron:`, `lora:`, `observing:`,
`resilience:`). Flags override the file. Unknown names are refused. Booleans take `True` / `False`, or stand bare for `True`.

The column *origin* says where a flag comes from. **BAGEL** flags are those of the original: **as is** (same name, meaning and default),
**becomes** (another setting does its work), or **refused** (some values cannot be honoured and end the run at start-up, with the reason).
**Megatron** flags have Megatron-Core's names. **New** flags belong to this project.
"""

_PRINTING = """\
## Printing the configuration

`--print_config` takes the place of training: it prints the resolved configuration and exits. The output holds every setting, the list
`given` of settings that were given, and under `derived` those that the run derives from others, such as the global batch size. `--config`
takes the output as it is, or edited, and derives the rest again.
"""

_TITLES = {
    "model": "Model", "data": "Data", "training": "Training", "megatron": "Megatron-Core (parallel sizes, precision, memory)",
    "lora": "Adapters (LoRA)", "observing": "Observing",
    "resilience": "When something goes wrong",
}  # fmt: skip


def flag_table() -> str:
    """Return the whole page."""
    parts = [_HEAD, *(f"## {_TITLES[section]}\n\n{_table(arguments)}" for section, arguments in SECTIONS.items())]
    return "\n".join([*parts, f"{_PRINTING}\n{_table(PrintArguments)}", _aliases()])


def _table(arguments: type) -> str:
    hints = get_type_hints(arguments)
    rows = "".join("\n" + _row(setting, hints[setting.name]) for setting in fields(arguments))
    return f"| flag | default | values | meaning | origin |\n| --- | --- | --- | --- | --- |{rows}\n"


def _row(setting: Field[Any], hint: Any) -> str:
    meaning = Flag.of(setting).help.replace("|", "/")
    return f"| `--{setting.name}` | {_default(setting)} | {_values(setting, hint)} | {meaning} | {_origin(setting)} |"


def _values(setting: Field[Any], hint: Any) -> str:
    choices = choices_of(setting, hint)
    return ", ".join(f"`{choice}`" for choice in choices) if choices else str(Flag.of(setting).range)


def _default(setting: Field[Any]) -> str:
    value = default_of(setting)
    return "–" if value in (None, []) else f"`{value}`"


def _origin(setting: Field[Any]) -> str:
    rules = Flag.of(setting)
    if rules.origin != "original":
        return {"megatron": "Megatron", "new": "new"}[rules.origin]
    kind, note = rules.compatibility.kind, rules.compatibility.note
    kind_text = kind if kind == "as is" else f"**{kind}**"
    return f"BAGEL, {kind_text}: {note}" if note else f"BAGEL, {kind_text}"


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
