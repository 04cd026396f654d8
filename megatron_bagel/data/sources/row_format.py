# SPDX-License-Identifier: Apache-2.0
"""How the rows of a dataset are written: the container of its files, the form of a row, and the names of its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Container = Literal["jsonl", "parquet", "tar"]


@dataclass(frozen=True)
class RowFormat:
    """The form of rows that are not those of BAGEL's guide (these have none).

    Attributes:
        container: Kind of the files.
        name: Name of the form (``forms.FORMS``), or an empty string for the group's own.
        columns: (our name, name in the files) of columns that have other names.
        has_vae: Whether the group has a transform for pictures of the autoencoder.
        has_vit: Whether the group has a transform for pictures of the vision tower.
    """

    container: Container
    name: str = ""
    columns: tuple[tuple[str, str], ...] = ()
    has_vae: bool = True
    has_vit: bool = True

    def renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row under our names; a key whose value is null is absent."""
        names = {theirs: ours for ours, theirs in self.columns}
        return {names.get(key, key): value for key, value in row.items() if value is not None}

    def name_in_file(self, column: str) -> str:
        """Return what the files call one of our columns."""
        return dict(self.columns).get(column, column)
