# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: what is counted, who stops when, and how ids become text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bagel.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bagel.inference.core.context import Context
from megatron_bagel.inference.core.noise import KeyedNoise
from megatron_bagel.inference.core.sampling import TextSampling
from megatron_bagel.inference.core.text import generate_text, readable


@dataclass
class Script:
    """Stands for an engine whose next token is written down: a context of length n says the n-th token of its script."""

    tokenizer: Tokenizer
    scripts: dict[int, list[int]]

    def next_logits(self, contexts: Sequence[Context], tokens: Sequence[int]) -> tuple[torch.Tensor, list[Context]]:
        # RoPE positions 1000 apart tell the scripts apart.
        said = [self.scripts[c.position // 1000][c.length] for c in contexts]
        logits = torch.nn.functional.one_hot(torch.tensor(said), len(self.tokenizer)).float()
        return logits, [c.advanced({}, 1, 1) for c in contexts]


@pytest.fixture
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return load_tokenizer(tiny_folder)


def test_each_text_stops_at_its_own_end(tokenizer: Tokenizer) -> None:
    red, circle = tokenizer.encode(" red")[0], tokenizer.encode("circle")[0]
    scripts = {0: [red, tokenizer.eos], 1: [circle, circle, circle, circle, circle], 2: [tokenizer.eos]}
    contexts = [Context(position=1000 * number) for number in scripts]
    draws = [np.random.default_rng(0)] * 3
    first, second, third = generate_text(Script(tokenizer, scripts), contexts, TextSampling(max_length=5), draws)
    assert first.ids == (tokenizer.bos, red) and first.finished
    # The opening token counts, so four are left.
    assert second.ids == (tokenizer.bos, *[circle] * 4) and not second.finished
    assert third.ids == (tokenizer.bos,) and third.text == "" and third.finished
    assert first.text == tokenizer.decode([red])


def test_length_one_asks_nothing_of_the_model(tokenizer: Tokenizer) -> None:
    (text,) = generate_text(Script(tokenizer, {0: []}), [Context()], TextSampling(max_length=1), [np.random.default_rng(0)])
    assert text.ids == (tokenizer.bos,) and text.text == ""


def test_text_is_cut_at_another_opening_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a red circle")
    assert readable(Script(tokenizer, {}), [tokenizer.bos, *ids, tokenizer.bos, *ids]) == "a red circle"


def test_noise_is_named_not_drawn_in_order() -> None:
    first, second = KeyedNoise(1, "a"), KeyedNoise(1, "a")
    first.posterior((2, 2, 2))
    assert torch.equal(first.initial((3, 4)), second.initial((3, 4)))
    assert not torch.equal(second.initial((3, 4)), first.posterior((3, 4)))
    for other in (KeyedNoise(2, "a"), KeyedNoise(1, "b")):
        assert not torch.equal(KeyedNoise(1, "a").initial((3, 4)), other.initial((3, 4)))
