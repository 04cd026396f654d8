"""The system prompts of think mode, in our own words; any text can be put in their place.

The released weights were tuned with other wordings of the same request; who wants their exact behaviour passes that wording.
"""

from __future__ import annotations

THINK_BEFORE_ANSWER = (
    "Work out the question step by step before you answer. Put that reasoning between <think> and </think>, "
    "and write the answer itself after the closing tag."
)
THINK_BEFORE_IMAGE = (
    "Before drawing, plan the picture: what it shows, how it is arranged, and what must be kept. "
    "Put the plan between <think> and </think>; the picture follows it."
)
