# SPDX-License-Identifier: Apache-2.0
"""Names of models on a hub are told from paths: what exists is a path, and so is a name below a folder that exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bagel.common.hub_names import HubName, hub_hint, hub_name, parse_hub_name, pinned_hub_name


@pytest.mark.parametrize(
    "text", ["/a/b", "./a/b", "../b", "a", "a/b/", "a/b/c", "~/b", "s3://a/b", "a/b@", "a b/c", "hf/x/ae.safetensors", "x/ae.safetensors"]
)
def test_paths_of_other_forms_are_no_names(text: str) -> None:
    assert parse_hub_name(text) is None and hub_name(text) is None and hub_hint(text) == ""


def test_a_name_with_and_without_a_revision() -> None:
    assert parse_hub_name("owner/My.Model-7B") == HubName("owner/My.Model-7B")
    assert parse_hub_name("owner/name@refs/pr/1") == HubName("owner/name", "refs/pr/1")
    assert str(parse_hub_name("owner/name@v1.0")) == "owner/name@v1.0"
    assert pinned_hub_name(f"owner/name@{'0a' * 20}") is not None and pinned_hub_name("owner/name@main") is None


def test_what_is_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_name("owner/name") == HubName("owner/name")
    (tmp_path / "owner").mkdir()
    assert hub_name("owner/name") is None, "most often a path with a typo, which must not fetch a stranger's model"
    assert hub_name("owner/name@main") == HubName("owner/name", "main")
    assert hub_hint("owner/name") == ". If the model owner/name on the hub is meant, write owner/name@main"
    (tmp_path / "owner/name@main").mkdir()
    (tmp_path / "owner/name").mkdir()
    assert hub_name("owner/name@main") is None and hub_name("owner/name") is None and hub_hint("owner/name") == ""
