# SPDX-License-Identifier: Apache-2.0
"""The modules of a run are built as its settings say."""

from __future__ import annotations

import pytest

from megatron_bagel.assembly.modules import BuildSettings, build_modules
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.costs.freezing import FreezeSettings
from megatron_bagel.model.kernels.choice import UsesKernels
from megatron_bagel.model.kernels.eager import EAGER
from tests.model.tiny import tiny_arch, tiny_config


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_every_part_of_the_decoder_computes_with_the_kernels_of_the_run(name: str) -> None:
    arch = tiny_arch()
    settings = BuildSettings(MegatronArguments(fused_kernels=name), FreezeSettings(), None)
    (decoder,) = build_modules(settings, arch, tiny_config(arch)).decoder
    chosen = {module.kernels is EAGER for module in decoder.modules() if isinstance(module, UsesKernels)}
    assert chosen == {name == "eager"}
