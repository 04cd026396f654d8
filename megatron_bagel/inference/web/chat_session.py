# SPDX-License-Identifier: Apache-2.0
"""One turn at the page of ``--serve``: which requests are allowed, and the model's reply. It knows nothing of the display."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from megatron_bagel.common.text_limits import DEFAULT_LIMITS, TextLimits
from megatron_bagel.data.transforms import EXIF_MODES, decode_rgb
from megatron_bagel.inference.batch.arguments import parse_size
from megatron_bagel.inference.batch.prompts import check_prompt_text
from megatron_bagel.inference.batch.requests import Observers, Request, answer
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.core.image_sampling import ImageSampling
from megatron_bagel.inference.core.noise import KeyedNoise
from megatron_bagel.inference.core.sampling import TextSampling

#: Limits: bytes and pixels of an image, texts and images of a conversation, Euler steps of a picture.
MAX_BYTES, MAX_PIXELS, MAX_TERMS, MAX_STEPS = 2**25, 2**24, 64, 200


@dataclass(frozen=True)
class Settings:
    """The fields beside the conversation as the user filled them in; an emptied number is ``None``, an emptied ``size`` sets none."""

    output: str
    think: bool
    size: str
    steps: float | None
    seed: float | None
    text_scale: float | None
    img_scale: float | None


@dataclass(frozen=True)
class Reply:
    """The model's reply. The page shows the thought; text and image become part of the conversation."""

    thought: str | None = None
    text: str | None = None
    image: Image.Image | None = None

    @property
    def terms(self) -> tuple[str | Image.Image, ...]:
        """Return the text and the picture that join the conversation."""
        return tuple(term for term in (self.text, self.image) if term is not None)


@dataclass(frozen=True)
class ChatSession:
    """A model with its defaults for writing and drawing. It makes one reply after another until it is closed.

    ``exif`` says whether uploaded pictures are turned as their EXIF orientation says (``decode_rgb``), ``limits`` how long a message
    may be and how deep a request may be nested.
    """

    engine: Engine
    text: TextSampling
    image: ImageSampling
    exif: str = EXIF_MODES[0]
    limits: TextLimits = DEFAULT_LIMITS
    _reply_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _closed: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def default_settings(self) -> Settings:
        """Return the initial values of the fields: the options of the command line."""
        guidance = self.image.guidance
        return Settings("image", False, "", self.image.num_timesteps - 1, 0, guidance.text_scale, guidance.img_scale)

    def reply(self, terms: Sequence[str | Image.Image], settings: Settings, stop: threading.Event | None = None) -> Reply:
        """Return the model's turn after ``terms``, the entire conversation.

        Once ``stop`` is set, the reply ends with ValueError at the next token or step. Raises ValueError before any work for an
        impossible request.
        """
        if len(terms) > MAX_TERMS:
            raise ValueError(f"this conversation has {len(terms)} texts and images, but the page reads at most {MAX_TERMS}; start again")
        for term in terms:
            if isinstance(term, str):
                check_prompt_text(term, "this message", self.limits)
        size = parse_size(settings.size) if settings.size else None
        request = Request(tuple(terms), settings.output, settings.think, size=size)
        if request.output == "image":
            self.engine.need_autoencoder()
            if size is not None:
                self.engine.latent_grid(*size)
        noise, sampling = KeyedNoise(int(_number("seed", settings.seed))), self._sampling(settings)
        with self._reply_lock:
            (result,) = answer(self.engine, [request], [noise], self.text, sampling, self._observers(stop))
        image = None if result.image is None else Image.fromarray(result.image)
        thought, text = (None if generated is None else generated.text for generated in (result.thought, result.text))
        return Reply(thought, text, image)

    def close(self) -> None:
        """End the current reply and those that wait, as ``stop`` does."""
        self._closed.set()

    def _observers(self, stop: threading.Event | None) -> Observers:
        def check_stopped(*_: object) -> None:
            if self._closed.is_set() or (stop is not None and stop.is_set()):
                raise ValueError("the model has been stopped")

        return Observers(check_stopped, check_stopped)

    def _sampling(self, settings: Settings) -> ImageSampling:
        steps = int(_number("steps", settings.steps))
        if not 1 <= steps <= MAX_STEPS:
            raise ValueError(f"steps is {steps}; the page allows 1 to {MAX_STEPS}")
        guidance = replace(
            self.image.guidance,
            text_scale=_number("text_scale", settings.text_scale),
            img_scale=_number("img_scale", settings.img_scale),
        )
        return replace(self.image, num_timesteps=steps + 1, guidance=guidance)


def read_image(path: str | Path, exif: str = EXIF_MODES[0]) -> Image.Image:
    """Read an uploaded image as RGB. Raises ValueError if it cannot be read or is too large."""
    try:
        return decode_rgb(Path(path).read_bytes(), MAX_PIXELS, exif)
    except OSError as error:
        raise ValueError(f"the image cannot be read ({error.strerror or error})") from error


def _number(name: str, value: float | None) -> float:
    if value is None:
        raise ValueError(f"{name} is empty; give a number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; give a number")
    return value
