# SPDX-License-Identifier: Apache-2.0
"""A sample in the index: texts, images and a few structure integers whose meaning depends on the group.

| group | texts | structure |
| --- | --- | --- |
| t2i_pretrain | the alternative captions | empty |
| unified_edit | per step, per alternative instruction a: "a", and with 3 images or more also "a." and " a." | alternatives per step |
| vlm_sft, text | the texts in order | IMAGE_ITEM, TEXT_ITEM, ANSWER_ITEM or a video (stored_videos.py) per item, in order |
| interleaved | the texts in order, each with its alternatives | the items, see stored_items.py |

A joined instruction ("a. b.") consists of the two extra forms of its parts: its ids are those of "a." and " b.".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IMAGE_ITEM, TEXT_ITEM, ANSWER_ITEM = 0, 1, 2  # an image, a text without loss, a text with loss
PLAIN, ENDED, CONTINUED = 0, 1, 2  # forms of an instruction: "a", "a.", " a."


class BadRow(ValueError):
    """The reason why a row is not in the index: one line, whatever stands in the names that it repeats."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason.replace("\n", "\\n").replace("\r", "\\r"))


def bad_row(error: Exception) -> BadRow:
    """Return the reason that an exception gives for a row: its first line, and its type unless it is a ValueError with a sentence."""
    if isinstance(error, BadRow):
        return error
    lines = str(error).splitlines()
    text = lines[0][:200] if lines else ""
    return BadRow(text if text and type(error) is ValueError else f"{type(error).__name__}: {text}".removesuffix(": "))


@dataclass(frozen=True)
class RawSample:
    """A valid row of a source file: its texts and structure as in the table above, and the encoded bytes of its images."""

    texts: list[str]
    structure: list[int]
    images: list[bytes]


@dataclass(frozen=True)
class Record:
    """The planning data of a sample, without text or pixels: ``text_tokens`` [texts], ``widths`` and ``heights`` [images] in pixels."""

    group: str
    text_tokens: np.ndarray
    structure: np.ndarray
    widths: np.ndarray
    heights: np.ndarray


def forms_per_instruction(num_images: int) -> int:
    """Return how many forms the index stores of every editing instruction of a sample of ``num_images`` images."""
    return 3 if num_images > 2 else 1


def instruction_index(alternatives: Sequence[int] | np.ndarray, num_images: int, step: int, alternative: int, form: int) -> int:
    """Return the index among an editing sample's texts of one form of an alternative instruction from image ``step`` to the next."""
    num_earlier = int(sum(int(n) for n in alternatives[:step]))
    return (num_earlier + alternative) * forms_per_instruction(num_images) + form
