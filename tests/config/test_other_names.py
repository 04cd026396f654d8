# SPDX-License-Identifier: Apache-2.0
"""Unknown flags: the names of other trainers lead to the right flag."""

from __future__ import annotations

import pytest

from megatron_bagel.config.flag_parser import OTHER_NAMES
from megatron_bagel.config.flag_rules import check_consistency
from megatron_bagel.config.parser import Config, parse_config
from megatron_bagel.config.sections import ALIASES, SETTINGS


@pytest.mark.parametrize("other", sorted(OTHER_NAMES))
def test_the_name_of_another_trainer_suggests_the_flag(other: str) -> None:
    assert OTHER_NAMES[other] in SETTINGS and other not in {**SETTINGS, **ALIASES}
    with pytest.raises(ValueError, match=rf"did you mean --{OTHER_NAMES[other]}\?|ambiguous|could match"):
        parse_config([f"--{other}", "1"])


def test_a_warm_up_that_leaves_no_step_to_decay_is_refused() -> None:
    flags = {"warmup_steps": 2, "total_steps": 2}
    with pytest.raises(ValueError, match="--warmup_steps 2 leaves no step of --total_steps 2"):
        check_consistency(Config.from_values({**flags, "lr_scheduler": "cosine"}))
    check_consistency(Config.from_values({**flags, "lr_scheduler": "constant"}))
    check_consistency(Config.from_values({**flags, "total_steps": 3, "lr_scheduler": "cosine"}))
