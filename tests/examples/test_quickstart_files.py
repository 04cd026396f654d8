# SPDX-License-Identifier: Apache-2.0
"""``examples/quickstart`` keeps the paths that documented commands of before name, with the files of the package."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "megatron_bagel" / "sample_world" / "assets"


def test_the_autoencoder_is_that_of_the_package_and_can_be_copied() -> None:
    """A folder of its own: a copy of a link would lead nowhere."""
    copied = ROOT / "examples" / "quickstart" / "autoencoder"
    assert not copied.is_symlink() and not any(path.is_symlink() for path in copied.iterdir())
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == {
        path.name: path.read_bytes() for path in (ASSETS / "vae").iterdir()
    }


def test_the_settings_are_those_of_the_package() -> None:
    assert (ROOT / "examples" / "quickstart" / "config.yaml").resolve() == ASSETS / "train.yaml"
