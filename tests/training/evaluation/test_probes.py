# SPDX-License-Identifier: Apache-2.0
"""Each text and picture with a loss of an interleaved sample is asked for after the true items before it; others have one probe."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.pack import build_pack
from megatron_bagel.training.evaluation.probes import Probe
from tests.strategies import SPEC


def text(*ids: int, loss: bool = False, label: int | None = None) -> Item:
    return Item("text", loss=loss, ids=np.array(ids), special_token_label=label)


def picture(loss: bool = False, kind: str = "vae") -> Item:
    return Item(kind, loss=loss, image=0, height=28 if kind == "vit" else 32, width=28 if kind == "vit" else 32)


QUESTION, THOUGHT, DRAWN, ANSWER = text(10, 11, label=3), text(12, loss=True), picture(loss=True), text(13, 14, loss=True)
ITEMS = (QUESTION, THOUGHT, DRAWN, picture(), picture(kind="vit"), ANSWER)


def test_an_interleaved_sample_has_a_probe_for_each_loss() -> None:
    probes = Probe.each(Sample("rows", 4, 0, ITEMS, "interleaved"), 0, 4)
    assert [probe.target for probe in probes] == [THOUGHT, DRAWN, ANSWER]
    assert [probe.name for probe in probes] == ["rows 4", "rows 4 item 2", "rows 4 item 5"]
    kinds = [[item.kind for item in probe.conditions] for probe in probes]
    assert kinds == [["text"], ["text", "text"], ["text", "text", "vae", "vit"]]
    for probe in probes:
        assert not any(item.loss for item in probe.conditions)
        if not probe.draws:  # the only loss positions are those of the answer, and of its start
            assert len(build_pack([probe.answering(5, 2)], SPEC).ce_positions) == 6
    assert [probe.draws for probe in probes] == [False, True, False]
    assert [len(view.items) for view in probes[1].views()] == [3, 2, 3]


def test_other_groups_have_one_probe() -> None:
    sample = Sample("edits", 4, 0, ITEMS, "unified_edit")
    assert [probe.name for probe in Probe.each(sample, 0, 4)] == ["edits 4"]
    assert (
        Probe.each(replace(sample, items=(QUESTION,)), 0, 4)
        == []
        == Probe.each(replace(sample, group="interleaved", items=ITEMS[2:3]), 0, 4)
    )
