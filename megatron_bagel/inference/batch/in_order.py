# SPDX-License-Identifier: Apache-2.0
"""Answers of several items, made in order: each text and picture is read again before the next is made, as interleaved data are trained.

What was made is read under the rules of training: a text between its two special tokens, a picture as clean latents and ViT patches. Every
item is a round of its own with noise of its own, so an item does not depend on those that come after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from PIL import Image

from megatron_bagel.inference.batch.requests import Answer, Request, Term, answer
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.core.image_sampling import ImageSampling
from megatron_bagel.inference.core.noise import NoiseSource
from megatron_bagel.inference.core.sampling import TextSampling

NoiseOf = Callable[[int, int], NoiseSource]  # (number of the request, number of the item) -> its noise


def answer_in_order(
    engine: Engine, requests: Sequence[Request], noise_of: NoiseOf, text: TextSampling, image: ImageSampling
) -> list[Answer]:
    """Answer a batch of requests. One without ``outputs`` has a single answer; of the others all items are made, in order."""
    made: list[list[Answer]] = [[] for _ in requests]
    for number in range(max((len(request.outputs) or 1 for request in requests), default=0)):
        open_requests = [row for row, request in enumerate(requests) if number < (len(request.outputs) or 1)]
        batch = [_next_request(requests[row], made[row]) for row in open_requests]
        noise = [noise_of(row, number) for row in open_requests]
        for row, result in zip(open_requests, answer(engine, batch, noise, text, image), strict=True):
            made[row].append(replace(result, latents=None) if requests[row].outputs else result)
    return [
        Answer(items=tuple(items)) if request.outputs else items[0] for request, items in zip(requests, made, strict=True)
    ]  # fmt: skip


def _next_request(request: Request, made: Sequence[Answer]) -> Request:
    """Return what asks for the next item: the terms so far, and the kind of the item."""
    if not request.outputs:
        return request
    terms = (*request.terms, *(_term(item) for item in made))
    return replace(request, terms=terms, output=request.outputs[len(made)], outputs=(), sees_latents=True)


def _term(item: Answer) -> Term:
    if item.text is not None:
        return item.text.ids[1:]
    if item.image is None:
        raise ValueError("an item of an answer has neither text nor picture")
    return Image.fromarray(item.image)
