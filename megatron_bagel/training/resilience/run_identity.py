# SPDX-License-Identifier: Apache-2.0
"""The identity of a run: a number drawn at its first start, which its folders, its checkpoints and its metrics carry.

<results_dir>/run.json and <checkpoint_dir>/run.json      {"run_id": "9b1e44d07c52", "begun": "2026-01-31T12:00:00+00:00", "follows": ""}
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from megatron_bagel.common.files import write_whole
from megatron_bagel.common.json_files import read_json

RUN_FILE = "run.json"


@dataclass(frozen=True)
class RunIdentity:
    """Who wrote a folder.

    Attributes:
        run_id: Twelve hexadecimal digits, drawn at the first start of the run.
        begun: The time of the first start, for people.
        follows: The run whose checkpoint in another folder this one continues; empty for none.
    """

    run_id: str
    begun: str = ""
    follows: str = ""

    @classmethod
    def new(cls, follows: str = "") -> RunIdentity:
        """Draw an identity that no other run has."""
        return cls(secrets.token_hex(6), datetime.now(timezone.utc).isoformat(timespec="seconds"), follows)

    @classmethod
    def read(cls, folder: Path) -> RunIdentity | None:
        """Return the identity in a folder, or None where none is written. Raises ValueError for a damaged file."""
        path = folder / RUN_FILE
        if not path.is_file():
            return None
        try:
            content = read_json(path, "identity of a run")
            return cls(str(content["run_id"]), str(content["begun"]), str(content["follows"]))
        except (ValueError, KeyError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{path} does not describe a run ({reason}); remove the file to continue, since the run's checkpoints name it too, or "
                "choose another folder"
            ) from error

    def write(self, folder: Path) -> None:
        """Write the identity into a folder, which is made if need be."""
        if RunIdentity.read(folder) != self:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / RUN_FILE, json.dumps(asdict(self)) + "\n")
