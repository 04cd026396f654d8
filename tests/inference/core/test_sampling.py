# SPDX-License-Identifier: Apache-2.0
"""Choosing tokens: only from the tokenizer's part of the vocabulary, and with the odds that temperature and top-p say."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from megatron_bagel.inference.core.sampling import TextSampling, next_token

LOGITS = torch.tensor([0.5, 0.1, 0.3, 0.1, 9.0]).log()


def counts(sampling: TextSampling, n: int = 4000) -> Counter:
    draw = np.random.default_rng(0)
    return Counter(next_token(LOGITS, sampling, draw, 4) for _ in range(n))


def test_greedy_never_takes_a_padding_row() -> None:
    assert next_token(LOGITS, TextSampling(), np.random.default_rng(0), 4) == 0
    assert next_token(LOGITS, TextSampling(), np.random.default_rng(0), 5) == 4


def test_frequencies_follow_the_probabilities() -> None:
    seen = counts(TextSampling(do_sample=True, temperature=1.0))
    assert set(seen) == {0, 1, 2, 3}
    for token, probability in enumerate((0.5, 0.1, 0.3, 0.1)):
        assert abs(seen[token] / 4000 - probability) < 0.03


def test_top_p_keeps_the_likeliest_that_reach_it() -> None:
    assert set(counts(TextSampling(do_sample=True, temperature=1.0, top_p=0.5))) == {0}
    assert set(counts(TextSampling(do_sample=True, temperature=1.0, top_p=0.51))) == {0, 2}


def test_low_temperature_is_nearly_greedy() -> None:
    assert counts(TextSampling(do_sample=True, temperature=0.05))[0] > 3990


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"max_length": 0}, "max_length"), ({"do_sample": True, "temperature": 0.0}, "temperature"), ({"top_p": 0.0}, "top_p")],
)
def test_bad_settings_are_named(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TextSampling(**settings)
