# SPDX-License-Identifier: Apache-2.0
"""The cases of generation that a set has: inputs and settings. A number among inputs is an image of the raw data."""

from __future__ import annotations

from typing import Any

PROMPT = "a photo of a red circle on a green background."
EDIT = "make the square blue"
#: Case -> (inputs, tokens of the answer, whether it thinks first).
TEXT_CASES: dict[str, tuple[list[str | int], int, bool]] = {
    "text_only_greedy": (["describe the picture"], 10, False),
    "vlm_greedy": ([0, "what is shown in the image?"], 10, False),
    "vlm_two_images_greedy": ([0, "and", 1, "what is different?"], 8, False),
    "vlm_think_greedy": ([0, "how many shapes are there?"], 6, True),
}
_PICTURE: dict[str, Any] = {
    "num_timesteps": 6, "image_shapes": (48, 32), "cfg_interval": [0.0, 1.0], "timestep_shift": 1.0, "cfg_renorm_min": 0.0,
    "cfg_renorm_type": "global", "cfg_text_scale": 4.0, "cfg_img_scale": 1.0,
}  # fmt: skip
_APP = {"cfg_interval": [0.4, 1.0], "timestep_shift": 3.0}
PICTURE_CASES: dict[str, dict[str, Any]] = {
    "t2i_nocfg": {**_PICTURE, "cfg_text_scale": 1.0},
    **{f"t2i_cfg4_{renorm}": {**_PICTURE, "cfg_renorm_type": renorm} for renorm in ("global", "channel", "text_channel")},
    "t2i_cfg4_renorm_min1": {**_PICTURE, "cfg_renorm_min": 1.0},
    "t2i_cfg4_interval_shift3": {**_PICTURE, **_APP, "num_timesteps": 8},
    "t2i_defaults_like_app": {**_PICTURE, **_APP, "num_timesteps": 10, "cfg_img_scale": 1.5},
}
_EDIT: dict[str, Any] = {
    "num_timesteps": 6, "cfg_interval": [0.0, 1.0], "timestep_shift": 3.0, "cfg_renorm_min": 0.0, "cfg_text_scale": 4.0,
    "cfg_img_scale": 2.0,
}  # fmt: skip
EDIT_CASES: dict[str, dict[str, Any]] = {
    **{f"edit_{renorm}": {**_EDIT, "cfg_renorm_type": renorm} for renorm in ("global", "channel", "text_channel")},
    "edit_text_only_cfg": {**_EDIT, "cfg_img_scale": 1.0, "cfg_renorm_type": "global"},
    "edit_img_only_cfg": {**_EDIT, "cfg_text_scale": 1.0, "cfg_renorm_type": "global"},
    "edit_think": {**_EDIT, "cfg_renorm_type": "global", "think": True, "max_think_token_n": 6},
}
