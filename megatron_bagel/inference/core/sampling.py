# SPDX-License-Identifier: Apache-2.0
"""Chooses the next token from logits. The caller passes the random generator, so a prompt's text does not depend on its batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TextSampling:
    """How text is decoded. ``max_length`` counts the opening token; without ``do_sample`` decoding is greedy.

    ``static_cache`` writes with tensors of fixed shapes (``token_loop.py``), on a GPU as one graph.
    """

    max_length: int = 1000
    do_sample: bool = False
    temperature: float = 0.3
    top_p: float = 1.0
    static_cache: bool = False

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}; it counts the opening token and must be at least 1")
        if self.do_sample and self.temperature <= 0:
            raise ValueError(f"text_temperature is {self.temperature}; it must be positive (drop do_sample for greedy decoding)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")


def next_token(logits: Tensor, sampling: TextSampling, generator: np.random.Generator, vocabulary: int) -> int:
    """Return the next token id from ``logits`` [V].

    Rows past ``vocabulary`` (the tokenizer's length) pad the embedding table and are never chosen. The original can choose one and
    then fails to decode it.
    """
    logits = logits[:vocabulary].float()
    if not sampling.do_sample:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    probabilities, order = probabilities.sort(descending=True, stable=True)
    cumulative = probabilities.cumsum(0)
    # The most likely tokens whose mass reaches top_p, including the one that crosses it.
    num_kept = int((cumulative - probabilities < sampling.top_p).sum())
    target = generator.random() * float(cumulative[num_kept - 1])
    rank = int(torch.searchsorted(cumulative[:num_kept], target, right=True))
    return int(order[min(rank, num_kept - 1)])
