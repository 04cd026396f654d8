# SPDX-License-Identifier: Apache-2.0
"""A few faults of a campaign in every test run, more with ``-m slow``; `campaign.py` draws as many as are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import draws
from tests.faults.campaign import main
from tests.faults.commands import Ended
from tests.faults.judges import NotHere, clean, damage_file, judge, refusal
from tests.faults.phases import World, make_world

SEED = 1
#: One of most kinds, each of some seconds; the numbers belong to the seed.
SHORT = (0, 3, 4, 7, 10, 21)
LONG = range(60)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("campaign"))


@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [pytest.param(n, marks=() if n in SHORT else pytest.mark.slow) for n in LONG])
def test_a_fault_is_answered_well(undisturbed: World, tmp_path: Path, number: int) -> None:
    fault = draws.draw(SEED, number)
    try:
        assert judge(fault, undisturbed, tmp_path) == [], fault
    except NotHere as reason:
        pytest.skip(str(reason))


def test_draws_depend_on_seed_and_number_alone() -> None:
    faults = [draws.draw(SEED, number) for number in range(300)]
    assert faults == [draws.draw(SEED, number) for number in range(300)] and faults != [draws.draw(2, number) for number in range(300)]
    assert {fault.kind for fault in faults} == set(draws.ALL_KINDS)
    assert {fault.where for fault in faults if fault.kind == "damage"} == set(draws.ALL_FILES)


def test_bad_answers_are_seen() -> None:
    """The judges refuse a hang, a traceback, a wrong status, and a message without a name."""
    assert clean(Ended(None, "", "")) and clean(Ended(1, "", "Traceback (most recent call last):\n  ...\nKeyError: 0"))
    assert refusal(Ended(2, "", "train: error: /data/x.bin is cut off"), "train", ["x.bin"]) == []
    assert refusal(Ended(1, "", "train: error: /data/x.bin is cut off"), "train", ["x.bin"])
    assert refusal(Ended(2, "", "train: error: a file is cut off"), "train", ["x.bin"])


@pytest.mark.parametrize(("how", "expected"), [("flip", b"ab\x9cd"), ("truncate", b"ab"), ("empty", b"")])
def test_damage(tmp_path: Path, how: str, expected: bytes) -> None:
    (tmp_path / "file").write_bytes(b"abcd")
    damage_file(tmp_path / "file", how, 0.5)
    assert (tmp_path / "file").read_bytes() == expected


def test_an_unknown_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--kind", "gremlins"])
    assert "gremlins" in capsys.readouterr().err
