# SPDX-License-Identifier: Apache-2.0
"""The system prompts of think mode, in this project's words; any other text can replace them.

The released weights were tuned with other wordings of the same request. Pass that wording to get their exact behaviour.
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
