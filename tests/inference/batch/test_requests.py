# SPDX-License-Identifier: Apache-2.0
"""Conversations: which view reads what, and that an answer does not depend on what it is batched with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_bagel.inference.batch.in_order import answer_in_order
from megatron_bagel.inference.batch.requests import Answer, Conversation, Request, answer, read_terms
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.core.guidance import Guidance
from megatron_bagel.inference.core.image_sampling import ImageSampling
from megatron_bagel.inference.core.noise import KeyedNoise
from megatron_bagel.inference.core.sampling import TextSampling

TEXT = TextSampling(max_length=8)
IMAGE = ImageSampling(4, 3.0, Guidance(4.0, 2.0, (0.0, 1.0)))


def run(engine: Engine, requests: list[Request], seeds: list[int], image: ImageSampling = IMAGE) -> list[Answer]:
    return answer(engine, requests, [KeyedNoise(seed) for seed in seeds], TEXT, image)


def test_a_batch_equals_its_prompts_alone(engine: Engine, pictures: list[Image.Image]) -> None:
    requests = [
        Request(("a red circle",), size=(16, 24)),
        Request((pictures[0], "make the square blue")),
        Request((pictures[1], "what color is it?"), output="text"),
        Request(("plan", pictures[1], "and", pictures[0], "draw"), think=True),
    ]
    seeds = [3, 4, 5, 6]
    for request, seed, together in zip(requests, seeds, run(engine, requests, seeds), strict=True):
        (alone,) = run(engine, [request], [seed])
        assert (together.text, together.thought) == (alone.text, alone.thought)
        if request.output == "image":
            torch.testing.assert_close(together.latents, alone.latents, atol=1e-5, rtol=1e-5)
            assert np.abs(together.image.astype(int) - alone.image).max() <= 1


def test_coupled_batch_is_the_originals_and_differs(engine: Engine) -> None:
    requests = [Request(("a red circle",), size=(16, 16)), Request(("two",), size=(16, 16))]
    coupled = run(engine, requests, [0, 1], replace(IMAGE, couple_batch=True))
    free = run(engine, requests, [0, 1])
    assert not torch.allclose(coupled[0].latents, free[0].latents, atol=1e-4)


def test_views_follow_the_rules(engine: Engine, pictures: list[Image.Image]) -> None:
    """Text enters all views but the one without text; an image enters the main view, which becomes the one without text."""
    ids = [5, 6, 7]
    conversation = Conversation(Request((pictures[0], ids, ids), think=True, system_prompt=[9]), KeyedNoise(0))
    read_terms(engine, [conversation])
    views = conversation.views
    image = engine.resize(pictures[0])
    rows, columns = engine.latent_grid(*reversed(image.size))
    seen = rows * columns + 2
    vision = views.main.length - seen - 3 - 2 * 5
    assert vision > 2
    assert views.without_text.length == views.main.length - 5
    assert views.without_images.length == 3 + 2 * 5
    # An image takes one position each time it is read, whatever its tokens.
    assert (views.main.position, views.without_text.position, views.without_images.position) == (3 + 2 + 10, 3 + 2 + 5, 3 + 10)
    assert conversation.last_image_size == (image.height, image.width)


def test_text_to_image_is_guided_by_the_empty_context(engine: Engine) -> None:
    conversation = Conversation(Request(("a red circle",)), KeyedNoise(0))
    read_terms(engine, [conversation])
    views = conversation.views
    assert views.without_text.length == 0 and views.without_images.length == views.main.length


def test_looking_only_does_not_read_latents(engine: Engine, pictures: list[Image.Image]) -> None:
    conversation = Conversation(Request((pictures[0], "what color is it?"), output="text"), KeyedNoise(0))
    read_terms(replace(engine, autoencoder=None), [conversation])
    assert conversation.views.main.position == 1 + len(engine.tokenizer.encode("what color is it?")) + 2


def test_edit_takes_the_size_of_the_last_image_unless_told(engine: Engine, pictures: list[Image.Image]) -> None:
    last, told = run(engine, [Request((*pictures, "x")), Request((*pictures, "x"), size=(8, 16))], [0, 0])
    assert last.image.shape[:2] == engine.resize(pictures[1]).size[::-1]
    assert told.image.shape == (8, 16, 3)


def test_seeds_decide(engine: Engine) -> None:
    request = Request(("a red circle",), size=(16, 16))
    first, again, other = run(engine, [request] * 3, [1, 1, 2])
    assert torch.equal(first.latents, again.latents) and not torch.equal(first.latents, other.latents)


def test_requests_are_checked() -> None:
    with pytest.raises(ValueError, match="output 'sound'"):
        Request(("x",), output="sound")
    with pytest.raises(ValueError, match="at least one text or image"):
        Request(())


def test_items_in_order_are_read_again(engine: Engine, pictures: list[Image.Image]) -> None:
    """Text, picture, text: each equals the answer to a prompt that holds the earlier items, whatever else is in the batch."""
    terms = ("plan", pictures[0], "go")
    ordered, plain = Request(terms, outputs=("text", "image", "text")), Request(("a red circle",), size=(16, 16))

    def noise(row: int, number: int) -> KeyedNoise:
        return KeyedNoise(7 + row, f"{number}")

    result, single = answer_in_order(engine, [ordered, plain], noise, TEXT, IMAGE)
    thought, picture, words = result.items
    assert thought.text is not None and picture.image is not None and words.text is not None and not single.items
    seen = [*terms, thought.text.ids[1:]]
    (again,) = answer(engine, [Request(tuple(seen), sees_latents=True)], [noise(0, 1)], TEXT, IMAGE)
    assert np.abs(again.image.astype(int) - picture.image).max() <= 1
    seen.append(Image.fromarray(picture.image))
    (end,) = answer(engine, [Request(tuple(seen), output="text", sees_latents=True)], [noise(0, 2)], TEXT, IMAGE)
    assert end.text == words.text
    (alone,) = answer_in_order(engine, [ordered], noise, TEXT, IMAGE)
    assert [item.text for item in alone.items] == [item.text for item in result.items]
    assert answer(engine, [plain], [noise(1, 0)], TEXT, IMAGE)[0].image.shape == single.image.shape


def test_a_text_in_order_sees_latents(engine: Engine, pictures: list[Image.Image]) -> None:
    """As in training, a picture before a text is read through the autoencoder, too."""
    lengths = []
    for sees_latents in (False, True):
        conversation = Conversation(Request((pictures[0],), output="text", sees_latents=sees_latents), KeyedNoise(0))
        read_terms(engine, [conversation])
        lengths.append(conversation.views.main.length)
    rows, columns = engine.latent_grid(*reversed(engine.resize(pictures[0]).size))
    assert lengths[1] - lengths[0] == rows * columns + 2
