# SPDX-License-Identifier: Apache-2.0
"""Hooks of MkDocs: what the pages link to outside ``docs/`` becomes part of the site, and every room of the package gets an API page.

Pages link as files do, so that a plain Git host shows them too. Here a link that leaves ``docs/`` leads to a copy below ``repository/``,
and the pages that are copied bring what they link to.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "megatron_bagel"
OUTSIDE = "repository"
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCED = re.compile(r"^[ \t]*```.*?^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
#: The mark of commands that need GPUs or a cluster (tests/docs/commands.py), which Markdown does not know.
GPU_FENCE = re.compile(r"^([ \t]*)```bash gpu[ \t]*$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the API pages at the end of the navigation."""
    config.nav = [*(config.nav or []), {"API": [{room.name: f"api/{room.name}.md"} for room in rooms()]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside ``docs/`` that pages lead to, and the API pages."""
    waiting = list(DOCS.glob("*.md"))
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        for target in sorted(linked_files(page) - seen):
            seen.add(target)
            if not target.is_relative_to(DOCS):
                files.append(copied_file(target, config))
            if target.suffix == ".md":
                waiting.append(target)
    for room in rooms():
        content = "\n".join(api_page(room))
        files.append(File.generated(config, f"api/{room.name}.md", content=content, inclusion=InclusionLevel.INCLUDED))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between files of the site, outside of fenced blocks."""
    shown = PurePosixPath(page.file.src_uri)
    if shown.parts[0] == "api":
        return markdown
    own = source_of(shown)
    result, start = [], 0
    for fence in FENCED.finditer(markdown):
        result += [with_site_links(markdown[start : fence.start()], own, shown), fence.group()]
        start = fence.end()
    result.append(with_site_links(markdown[start:], own, shown))
    return GPU_FENCE.sub(r'\1```bash title="on GPUs or a cluster"', "".join(result))


def with_site_links(text: str, own: Path, shown: PurePosixPath) -> str:
    """Return ``text`` of the file ``own``, which the site has at ``shown``, with its relative links as the site has them."""

    def replaced(match: re.Match[str]) -> str:
        target = (own.parent / match.group(2)).resolve()
        if "://" in match.group(2) or not target.is_file():
            return match.group()
        back = "../" * len(shown.parent.parts)
        return f"{match.group(1)}{back}{site_path(target)}{match.group(3) or ''}{match.group(4)}"

    return LINK.sub(replaced, text)


def source_of(shown: PurePosixPath) -> Path:
    """Return the file of the repository that a page of the site is made from."""
    return ROOT.joinpath(*shown.parts[1:]) if shown.parts[0] == OUTSIDE else DOCS / shown


def site_path(target: Path) -> str:
    """Return where the site has a file of the repository."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    path = target.relative_to(ROOT)
    # Files without a suffix would be taken for pages by some servers.
    return (PurePosixPath(OUTSIDE) / (path if path.suffix else f"{path}.txt")).as_posix()


def copied_file(target: Path, config: MkDocsConfig) -> File:
    """Return a file of the repository as part of the site; pages that the navigation does not list are fine."""
    if target.suffix == ".md":
        content: str | bytes = target.read_text(encoding="utf-8")
    else:
        content = target.read_bytes()
    return File.generated(config, site_path(target), content=content, inclusion=InclusionLevel.NOT_IN_NAV)


def linked_files(page: Path) -> set[Path]:
    """Return the files of the repository that a page links to."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    targets = ((page.parent / match.group(2)).resolve() for match in LINK.finditer(text) if "://" not in match.group(2))
    return {target for target in targets if target.is_file()}


def rooms() -> list[Path]:
    """Return the folders of the package, by name."""
    return sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def api_page(room: Path) -> Iterator[str]:
    """Yield the lines of a room's page: what it is for, and every module with public names."""
    yield f"# {room.name}"
    yield ""
    yield ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
    for path in sorted(room.rglob("*.py")):
        names = [
            node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        ]
        if path.name != "__init__.py" and any(not name.startswith("_") for name in names):
            yield f"\n::: {'.'.join(path.relative_to(ROOT).with_suffix('').parts)}"
