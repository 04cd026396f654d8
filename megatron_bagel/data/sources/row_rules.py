# SPDX-License-Identifier: Apache-2.0
"""What a source row may be: the limits and permissions that a build gives by flag and that decide which rows are kept out."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bagel.common.text_limits import TextLimits

#: The command whose flags these are. Reasons name it, for training builds an index too and lacks the flags.
BUILD = "megatron-bagel data build"


@dataclass(frozen=True)
class RowRules(TextLimits):
    """Limits and permissions of a row.

    Attributes:
        allow_outside_root: Whether names of images and videos may leave their folder, by ``..``, as an absolute path or as a URL.
        store_videos: Whether a video stays a video, whose frames are chosen in every epoch, or becomes images once.
    """

    allow_outside_root: bool = False
    store_videos: bool = False


DEFAULT_RULES = RowRules()
