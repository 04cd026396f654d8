# SPDX-License-Identifier: Apache-2.0
"""The site's navigation has every page, and its link check finds what leads nowhere. ``bash tests/site.sh`` builds the site itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.commands import ROOT
from tests.docs.site_links import dead_links, main


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, which names Python functions, without calling them."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def _pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [page for value in values for page in _pages(value)]


def test_the_navigation_has_every_page_once() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)
    assert sorted(_pages(config["nav"])) == sorted(path.name for path in ROOT.glob("docs/*.md"))
    assert config["strict"] is True


def test_the_link_check_finds_what_leads_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    links = ("other.html", "other.html#part", "other.html#gone", "gone.html", "#here", "#gone", "https://example.org", "picture.png")
    body = "".join(f'<a href="{link}">x</a>' for link in links)
    (tmp_path / "index.html").write_text(f'<h1 id="here">t</h1>{body}<img src="gone.png">', encoding="utf-8")
    (tmp_path / "other.html").write_text('<h2 id="part">t</h2><a href="index.html#here">x</a>', encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"")
    dead, inside, outside = dead_links(tmp_path)
    assert [line.split(": ")[1] for line in dead] == ["other.html#gone", "gone.html", "#gone", "gone.png"]
    assert (inside, outside) == (9, 1)
    assert main([str(tmp_path)]) == 1 and "gone.html" in capsys.readouterr().out
    assert main([str(tmp_path / "absent")]) == 2
