# SPDX-License-Identifier: Apache-2.0
"""The keys ``format`` and ``columns`` of the dataset YAML: for a whole group, or for one dataset under ``dataset_info``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_bagel.data.sources.forms import FORMS

Columns = tuple[tuple[str, str], ...]


def parse_form(value: Any, is_interleaved: bool, label: str) -> str:
    """Return the name of a row's form. Raises ValueError naming ``label`` for an unknown one, or one of a group with its own form."""
    if value is None:
        return ""
    if not is_interleaved:
        raise ValueError(
            f"{label}: format belongs to the group interleaved; other groups have one form of row, whose columns can be renamed"
        )
    if not isinstance(value, str) or value not in FORMS:
        closest = difflib.get_close_matches(str(value), FORMS, n=1, cutoff=0.4)
        hint = f"did you mean {closest[0]!r}? " if closest else ""
        raise ValueError(f"{label}: format {value!r} is unknown; {hint}Known: {', '.join(FORMS)}")
    return value


def parse_columns(value: Any, label: str) -> Columns:
    """Return (our name, name in the files) of renamed columns. Raises ValueError naming ``label`` if the mapping is none."""
    if value is None:
        return ()
    if not isinstance(value, Mapping) or not all(isinstance(part, str) and part for pair in value.items() for part in pair):
        raise ValueError(f"{label}: columns must map our names to those in the files, such as {{image: img, caption: text}}; got {value!r}")
    if len(set(value.values())) != len(value):
        raise ValueError(f"{label}: columns gives one column of the files two names: {dict(value)}")
    return tuple(sorted(value.items()))


def per_dataset(key: str, names: Sequence[str], keys: Mapping[str, Any], info: Mapping[str, Any], label: str) -> list[Any]:
    """Return the value of a key for every dataset: under ``dataset_info``, or in the group as one value or one per dataset."""
    shared = keys.get(key)
    if isinstance(shared, list) and len(shared) != len(names):
        raise ValueError(f"{label}: {key} needs one entry, or one per dataset name ({len(names)}), got {shared!r}")
    values = shared if isinstance(shared, list) else [shared] * len(names)
    return [(info.get(name) or {}).get(key, value) for name, value in zip(names, values, strict=True)]
