# SPDX-License-Identifier: Apache-2.0
"""Generates text from many contexts at once, token by token; each stops at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_bagel.inference.core.context import Context
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.core.sampling import TextSampling, next_token
from megatron_bagel.inference.core.token_loop import GrowingLoop, StaticLoop, TokenLoop

# Called with (context number, logits [V]) of every prediction.
LogitsObserver = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class GeneratedText:
    """A generated text. ``ids`` include the opening but not the closing token; ``finished`` is False if the length ran out."""

    ids: tuple[int, ...]
    text: str
    finished: bool


def readable(engine: Engine, ids: Sequence[int]) -> str:
    """Return the text of generated ids without the opening token, cut at a closing or another opening token that is spelled out."""
    opening, closing = (engine.tokenizer.decode([token]) for token in (engine.tokenizer.bos, engine.tokenizer.eos))
    return engine.tokenizer.decode(ids).split(closing)[0].split(opening)[1]


@torch.no_grad()
def generate_text(
    engine: Engine,
    contexts: Sequence[Context],
    sampling: TextSampling,
    draws: Sequence[np.random.Generator],
    observe: LogitsObserver | None = None,
) -> list[GeneratedText]:
    """Continue each context with a text; the contexts do not change.

    To put the text into a context, read it with ``Engine.add_text``, as the original does with thoughts.
    """
    ids = [[engine.tokenizer.bos] for _ in contexts]
    current = list(range(len(contexts)))
    loop = _loop(engine, contexts, sampling)
    for _ in range(sampling.max_length - 1):
        numbers = list(current)
        logits = loop.logits(numbers, [ids[n][-1] for n in numbers])
        for row, number in enumerate(numbers):
            if observe is not None:
                observe(number, logits[row])
            token = next_token(logits[row], sampling, draws[number], len(engine.tokenizer))
            if token == engine.tokenizer.eos:
                current.remove(number)
            else:
                ids[number].append(token)
        if not current:
            break
    return [GeneratedText(tuple(i), readable(engine, i), n not in current) for n, i in enumerate(ids)]


def _loop(engine: Engine, contexts: Sequence[Context], sampling: TextSampling) -> TokenLoop:
    if sampling.static_cache and contexts:
        return StaticLoop(engine, contexts, sampling.max_length - 1)
    return GrowingLoop(engine, contexts)
