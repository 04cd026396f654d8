# SPDX-License-Identifier: Apache-2.0
"""Follows every link of a built site: ``python tests/docs/site_links.py SITE`` prints what leads nowhere, and then exits with 1.

Links to other hosts are counted and not followed. It needs nothing but Python.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Attributes that lead to another file.
TARGETS = {"a": "href", "link": "href", "img": "src", "script": "src", "source": "src"}


class Links(HTMLParser):
    """The targets and the anchors of one page."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what a tag leads to, and the name under which it can be reached."""
        values = dict(attrs)
        self.anchors.update(value for name in ("id", "name") if (value := values.get(name)))
        if (target := values.get(TARGETS.get(tag, ""))) is not None:
            self.targets.append(target)


def read_page(path: Path) -> Links:
    """Return the links of a page."""
    links = Links()
    links.feed(path.read_text(encoding="utf-8"))
    return links


def dead_links(site: Path) -> tuple[list[str], int, int]:
    """Return the links that lead nowhere as "page: target", the number of links inside the site, and of those to other hosts."""
    # The page of a server for what it does not have names everything from the server's root, which a folder does not have.
    pages = {path.resolve(): read_page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    dead, inside, outside = [], 0, 0
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                outside += parts.scheme in ("http", "https")
                continue
            inside += 1
            path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            path = path / "index.html" if path.is_dir() else path
            # "__..." anchors are those of the theme, which its script makes.
            anchor = "" if parts.fragment.startswith("__") else unquote(parts.fragment)
            if not path.is_file() or (anchor and path in pages and anchor not in pages[path].anchors):
                dead.append(f"{page.relative_to(site.resolve())}: {target}")
    return dead, inside, outside


def main(arguments: list[str]) -> int:
    """Print what leads nowhere. Exit status: 0 nothing, 1 something, 2 no site."""
    site = Path(arguments[0]) if arguments else Path("site")
    if not (site / "index.html").is_file():
        print(f"there is no site in {site}", file=sys.stderr)
        return 2
    dead, inside, outside = dead_links(site)
    print("\n".join(dead) if dead else f"{inside} links inside the site lead somewhere; {outside} to other hosts were not followed")
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
