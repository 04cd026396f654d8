"""One rank's files of local checkpoints, and a note beside each: what it is, and its checksum. No function here waits for another rank.

<folder>/iter_0000005_0_local.pt          rank 0's share of step 5, written by nvidia-resiliency-ext under another name and renamed
<folder>/iter_0000005_0_local.json        the note, written when the file is whole
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bagel.checkpoint.dist.checksums import digests
from megatron_bagel.common.files import write_whole

_NAME = re.compile(r"iter_(\d+)_\d+_local(\.dirty)?\.(pt|json|json\.new)")


@dataclass(frozen=True)
class RankFiles:
    """The files of `rank` in `folder`."""

    folder: Path
    rank: int

    def file(self, step: int) -> Path:
        """Where the share of a step lies."""
        return self.folder / f"iter_{step:07d}_{self.rank}_local.pt"

    def write_note(self, step: int, head: Mapping[str, Any]) -> None:
        """After the file of a step was written. Raises OSError."""
        note = self.file(step).with_suffix(".json")
        write_whole(note, json.dumps({"head": head, "sum": _sum(self.file(step))}))

    def read_head(self, step: int) -> dict[str, Any]:
        """What was said of a step when it was written. Raises ValueError where its file is not the one that was written then."""
        path = self.file(step)
        try:
            note = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            head, wanted = note["head"], note["sum"]
            found = _sum(path)
        except OSError as error:
            raise ValueError(f"{path}: its save did not finish ({error})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: the note beside it is damaged ({error})") from error
        if found != wanted:
            raise ValueError(f"{path} does not have the checksum it was written with")
        return head

    def remove(self, unwanted: Callable[[int], bool]) -> None:
        """Remove the files of unwanted steps, and what killed saves left. Raises OSError."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            found = _NAME.fullmatch(path.name)
            if found and (found[2] or found[3] == "json.new" or unwanted(int(found[1]))):
                # The manager removes old files too, in a thread of its own.
                path.unlink(missing_ok=True)


def _sum(path: Path) -> dict[str, Any]:
    return digests([path])[path.name]
