# SPDX-License-Identifier: Apache-2.0
"""Text from tables of fixed shape is the text of growing caches: the same tokens, and logits within rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_bagel.inference.core.context import Context
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.core.sampling import TextSampling
from megatron_bagel.inference.core.text import generate_text
from megatron_bagel.inference.core.token_loop import GrowingLoop, StaticLoop
from tests.inference.cpu_graphs import CpuGraph, cpu_graphs  # noqa: F401 - a fixture


def contexts_of(engine: Engine, pictures: list[Image.Image]) -> list[Context]:
    """Contexts of different lengths: empty, a text, a picture and a text, and one that shares its beginning with the last."""
    empty = Context()
    (text,) = engine.add_text([empty], [engine.tokenizer.encode("a red circle")])
    (looked,) = engine.add_features([empty], pictures[:1])
    (asked,) = engine.add_text([looked], [engine.tokenizer.encode("what color is it?")])
    return [empty, text, asked, looked]


def test_the_same_text_and_logits(engine: Engine, pictures: list[Image.Image]) -> None:
    contexts = contexts_of(engine, pictures)
    seen: dict[bool, list[tuple[int, torch.Tensor]]] = {False: [], True: []}
    for do_sample in (False, True):
        texts = [
            generate_text(
                engine, contexts, TextSampling(12, do_sample, temperature=1.0, static_cache=static),
                [np.random.default_rng(number) for number in range(len(contexts))],
                lambda number, logits, static=static: seen[static].append((number, logits)),
            )
            for static in (False, True)
        ]  # fmt: skip
        assert texts[0] == texts[1]
    assert len(seen[True]) == len(seen[False]) >= 22
    for (row, logits), (same_row, same) in zip(seen[False], seen[True], strict=True):
        assert row == same_row
        torch.testing.assert_close(same, logits, rtol=1e-5, atol=1e-5)
    assert [context.length for context in contexts_of(engine, pictures)] == [context.length for context in contexts], "contexts stay"


@torch.no_grad()
def test_rows_that_have_ended_change_nothing(engine: Engine, pictures: list[Image.Image]) -> None:
    """And no tensor moves, which a captured graph relies on."""
    contexts = contexts_of(engine, pictures)
    growing, static = GrowingLoop(engine, contexts), StaticLoop(engine, contexts, 4)
    tokens = engine.tokenizer.encode("a red circle")[:2] * 2
    static.logits([0, 1, 2, 3], tokens)
    growing.logits([0, 1, 2, 3], tokens)
    places = [table.data_ptr() for pair in static._attention._tables.values() for table in pair]
    for rows in ([0, 2, 3], [2], [2]):
        torch.testing.assert_close(
            static.logits(rows, tokens[: len(rows)]), growing.logits(rows, tokens[: len(rows)]), rtol=1e-5, atol=1e-5
        )
    assert places == [table.data_ptr() for pair in static._attention._tables.values() for table in pair]
    assert static._attention.lengths.tolist() == [context.length + 4 for context in contexts]


@pytest.mark.usefixtures("cpu_graphs")
@torch.no_grad()
def test_a_replayed_pass_writes_on(engine: Engine, pictures: list[Image.Image]) -> None:
    """The capture reads the first token, whose warm-up is taken back, and replays read the others."""
    contexts, tokens = contexts_of(engine, pictures), engine.tokenizer.encode("a red circle on a green")[:5]
    growing, static = GrowingLoop(engine, contexts), StaticLoop(engine, contexts, len(tokens))
    for token in tokens:
        logits = static.logits([0, 1, 2, 3], [token] * 4)
        torch.testing.assert_close(logits, growing.logits([0, 1, 2, 3], [token] * 4), rtol=1e-5, atol=1e-5)
    assert CpuGraph.replays == len(tokens)
