# SPDX-License-Identifier: Apache-2.0
"""Parts of a page that a program writes: they stand between the lines ``<!-- NAME -->`` and ``<!-- /NAME -->``."""

from __future__ import annotations

from pathlib import Path

from megatron_bagel.common.files import write_whole


def put_between(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of a page. Raises ValueError when the page does not have both."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found_begin, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{page} has no lines {begin} and {end} to put the text between")
    write_whole(page, f"{before}{begin}\n\n{text}\n\n{end}{after}")
