# SPDX-License-Identifier: Apache-2.0
"""What one prompt asks for, and how a batch of prompts becomes contexts and answers: the rules of the conversation.

The rules are the original's. Every text is read under all views except the one without the last text. Every image is read only under
the main view, after which the view without text restarts from there. Thoughts enter only the main view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_bagel.inference.batch.system_prompts import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE
from megatron_bagel.inference.core.context import Context, GuidedContext
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.core.image import StepObserver, decode_picture, generate_latents
from megatron_bagel.inference.core.image_sampling import ImageSampling
from megatron_bagel.inference.core.noise import NoiseSource
from megatron_bagel.inference.core.sampling import TextSampling
from megatron_bagel.inference.core.text import GeneratedText, LogitsObserver, generate_text

OUTPUTS = ("image", "text")
DEFAULT_SIDE = 1024

Term = str | Image.Image | Sequence[int]


@dataclass(frozen=True)
class Request:
    """One prompt: its terms in order, and the kind of its output.

    A term is a text, its token ids, or an RGB image. ``think`` puts ``system_prompt`` first (a text or its ids; ``None`` means the
    project's wording), and for an image lets the model write a plan before drawing. ``size`` is the (height, width) in pixels of the
    picture; ``None`` means the last input image's size, or ``default_size`` without one. ``outputs`` are the kinds of several items to make
    in order (in_order.py). ``sees_latents`` reads images through the autoencoder also for a text, as interleaved data do.
    """

    terms: tuple[Term, ...]
    output: str = "image"
    think: bool = False
    system_prompt: str | Sequence[int] | None = None
    size: tuple[int, int] | None = None
    outputs: tuple[str, ...] = ()
    sees_latents: bool = False

    def __post_init__(self) -> None:
        for output in (self.output, *self.outputs):
            if output not in OUTPUTS:
                raise ValueError(f"output '{output}' is unknown; choose one of {', '.join(OUTPUTS)}")
        if not self.terms:
            raise ValueError("a prompt needs at least one text or image")


@dataclass(frozen=True)
class Answer:
    """The result of a request; ``image`` is uint8 [H, W, 3], ``latents`` [tokens, channels] are before decoding.

    ``items`` are the results of a request with ``outputs``, in order.
    """

    text: GeneratedText | None = None
    thought: GeneratedText | None = None
    image: np.ndarray | None = None
    latents: Tensor | None = None
    items: tuple[Answer, ...] = ()


@dataclass
class Conversation:
    """A request in progress: its views, its noise, and the size of the last image it has read."""

    request: Request
    noise: NoiseSource
    views: GuidedContext = field(default_factory=GuidedContext)
    last_image_size: tuple[int, int] | None = None

    @property
    def draws(self) -> bool:
        """Return whether the answer is a picture."""
        return self.request.output == "image"


@dataclass
class Observers:
    """Hooks for checks and progress bars, called by ``generate_text`` and ``generate_latents``."""

    logits: LogitsObserver | None = None
    step: StepObserver | None = None


@torch.no_grad()
def answer(
    engine: Engine,
    requests: Sequence[Request],
    noise: Sequence[NoiseSource],
    text: TextSampling,
    image: ImageSampling,
    observers: Observers | None = None,
) -> list[Answer]:
    """Answer a batch of requests. Each answer is the one it would get alone, unless ``image.couple_batch`` couples them."""
    observers = observers or Observers()
    conversations = [Conversation(request, source) for request, source in zip(requests, noise, strict=True)]
    read_terms(engine, conversations)
    texts = _write(engine, [c for c in conversations if not c.draws or c.request.think], text, observers)
    thinkers = [c for c in conversations if c.draws and c.request.think]
    extended = engine.add_text([c.views.main for c in thinkers], [engine.tokenizer.encode(texts[id(c)].text) for c in thinkers])
    for conversation, main in zip(thinkers, extended, strict=True):
        conversation.views = replace(conversation.views, main=main)
    pictures = _draw(engine, [c for c in conversations if c.draws], image, observers)
    return [
        Answer(thought=texts.get(id(c)), latents=pictures[id(c)][0], image=pictures[id(c)][1]) if c.draws else Answer(text=texts[id(c)])
        for c in conversations
    ]


def read_terms(engine: Engine, conversations: Sequence[Conversation]) -> None:
    """Read the terms of every conversation into its views, one term of each per round."""
    thinking = [c for c in conversations if c.request.think]
    prompts = [_ids(engine, _system_prompt(c.request)) for c in thinking]
    # The think prompt belongs to both reduced views, which start after it.
    _extend(thinking, "main", lambda contexts: engine.add_text(contexts, prompts))
    _extend(thinking, "without_images", lambda contexts: engine.add_text(contexts, prompts))
    for term_index in range(max((len(c.request.terms) for c in conversations), default=0)):
        with_term = [c for c in conversations if term_index < len(c.request.terms)]
        _read_texts(engine, [c for c in with_term if not isinstance(c.request.terms[term_index], Image.Image)], term_index)
        _read_images(engine, [c for c in with_term if isinstance(c.request.terms[term_index], Image.Image)], term_index)


def _read_texts(engine: Engine, conversations: Sequence[Conversation], term_index: int) -> None:
    terms = [c.request.terms[term_index] for c in conversations]
    ids = [_ids(engine, term) for term in terms if not isinstance(term, Image.Image)]
    for conversation in conversations:
        conversation.views = replace(conversation.views, without_text=conversation.views.main)
    _extend(conversations, "main", lambda contexts: engine.add_text(contexts, ids))
    _extend(conversations, "without_images", lambda contexts: engine.add_text(contexts, ids))


def _read_images(engine: Engine, conversations: Sequence[Conversation], term_index: int) -> None:
    terms = {id(c): c.request.terms[term_index] for c in conversations}
    images = {key: engine.resize(term) for key, term in terms.items() if isinstance(term, Image.Image)}
    for conversation in conversations:
        width, height = images[id(conversation)].size
        conversation.last_image_size = (height, width)
    drawing = [c for c in conversations if c.draws or (c.request.sees_latents and engine.autoencoder is not None)]
    noise = [c.noise.posterior(engine.posterior_shape(images[id(c)])) for c in drawing]
    _extend(drawing, "main", lambda contexts: engine.add_latents(contexts, [images[id(c)] for c in drawing], noise))
    if engine.vision_tower is not None or len(drawing) < len(conversations):
        _extend(conversations, "main", lambda contexts: engine.add_features(contexts, [images[id(c)] for c in conversations]))
    for conversation in conversations:
        conversation.views = replace(conversation.views, without_text=conversation.views.main)


def _extend(conversations: Sequence[Conversation], view: str, add: Callable[[list[Context]], list[Context]]) -> None:
    if not conversations:
        return
    contexts = add([getattr(c.views, view) for c in conversations])
    for conversation, context in zip(conversations, contexts, strict=True):
        conversation.views = replace(conversation.views, **{view: context})


def _ids(engine: Engine, text: str | Sequence[int]) -> list[int]:
    return engine.tokenizer.encode(text) if isinstance(text, str) else list(text)


def _system_prompt(request: Request) -> str | Sequence[int]:
    if request.system_prompt is not None:
        return request.system_prompt
    return THINK_BEFORE_IMAGE if request.output == "image" else THINK_BEFORE_ANSWER


def _write(engine: Engine, conversations: Sequence[Conversation], sampling: TextSampling, observers: Observers) -> dict[int, GeneratedText]:
    """Return the text of each conversation by identity."""
    if not conversations:
        return {}
    draws = [c.noise.text() for c in conversations]
    texts = generate_text(engine, [c.views.main for c in conversations], sampling, draws, observers.logits)
    return {id(c): text for c, text in zip(conversations, texts, strict=True)}


def default_size(engine: Engine) -> tuple[int, int]:
    """Return 1024 x 1024, or the largest square of the model's position table."""
    reach = engine.arch.max_latent_size * engine.arch.vae_token_pixels
    return min(DEFAULT_SIDE, reach), min(DEFAULT_SIDE, reach)


def _draw(
    engine: Engine, conversations: Sequence[Conversation], sampling: ImageSampling, observers: Observers
) -> dict[int, tuple[Tensor, np.ndarray]]:
    """Return (latent tokens, pixels) of each conversation by identity."""
    if not conversations:
        return {}
    engine.need_autoencoder()
    grids = [engine.latent_grid(*(c.request.size or c.last_image_size or default_size(engine))) for c in conversations]
    channels = engine.arch.latent_token_dim
    noise = [c.noise.initial((rows * columns, channels)) for c, (rows, columns) in zip(conversations, grids, strict=True)]
    latents = generate_latents(engine, [c.views for c in conversations], grids, noise, sampling, observers.step)
    return {id(c): (tokens, decode_picture(engine, tokens, grid)) for c, tokens, grid in zip(conversations, latents, grids, strict=True)}
