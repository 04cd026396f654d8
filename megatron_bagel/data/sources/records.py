"""A sample as the index holds it: texts, images and a few structure integers whose meaning depends on the group.

| group | texts | structure |
| --- | --- | --- |
| t2i_pretrain | the alternative captions | empty |
| unified_edit | per step, per alternative instruction a: "a", and with 3 images or more also "a." and " a." | alternatives per step |
| vlm_sft, text | the texts in order | IMAGE_ITEM, TEXT_ITEM or ANSWER_ITEM per item, in order |

The two extra forms of an instruction are what a joined instruction ("a. b.") is made of: its ids are those of "a." and " b.".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IMAGE_ITEM, TEXT_ITEM, ANSWER_ITEM = 0, 1, 2  # an image, a text without loss, a text with loss
PLAIN, ENDED, CONTINUED = 0, 1, 2  # forms of an instruction: "a", "a.", " a."


@dataclass(frozen=True)
class RawSample:
    """A good row of a source file: its texts and structure as in the table above, and the encoded bytes of its images."""

    texts: list[str]
    structure: list[int]
    images: list[bytes]


@dataclass(frozen=True)
class Record:
    """What planning knows of a sample: no text, no pixel. ``text_tokens`` [texts], ``widths`` and ``heights`` [images] in pixels."""

    group: str
    text_tokens: np.ndarray
    structure: np.ndarray
    widths: np.ndarray
    heights: np.ndarray


def forms_per_instruction(num_images: int) -> int:
    """How many forms the index holds of every editing instruction of a sample of ``num_images`` images."""
    return 3 if num_images > 2 else 1


def instruction_index(alternatives: Sequence[int] | np.ndarray, num_images: int, step: int, alternative: int, form: int) -> int:
    """Position among an editing sample's texts of one form of one alternative of the instruction from image ``step`` to the next."""
    before = int(sum(int(n) for n in alternatives[:step]))
    return (before + alternative) * forms_per_instruction(num_images) + form
