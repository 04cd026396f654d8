# SPDX-License-Identifier: Apache-2.0
"""What comes back from a checkpoint passes the checker like the recorded folder it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.cli.convert import hf_to_megatron, megatron_to_hf
from tests.checkpoint.test_layout_matrix import LAYOUTS, load_and_save
from tests.distributed import run_ranks
from tests.tools.test_verify_golden import linked
from tools import verify_golden


@pytest.mark.slow
@pytest.mark.distributed
def test_the_converted_folder_passes_after_a_journey_over_eight_ranks(
    goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folder -> checkpoint -> a tensor- and pipeline-parallel model -> its checkpoint -> folder."""
    assert hf_to_megatron.main(["--model", str(goldens / "hf"), "--output", str(tmp_path / "in")]) == 0
    checkpoint, layout = tmp_path / "in/0000000", LAYOUTS["tp4-pp2"]
    journey = [(checkpoint, tmp_path / "there", "ema")]
    run_ranks(load_and_save, layout.ranks, layout, CheckpointWeights(checkpoint).arch, journey, parallel=layout.groups, timeout=600)
    out = tmp_path / "out"
    command = ["--checkpoint", str(tmp_path / "there"), "--output", str(out), "--weights", "model"]
    assert megatron_to_hf.main([*command, "--tokenizer", str(goldens / "hf"), "--autoencoder", str(goldens / "hf/ae.safetensors")]) == 0
    # The checker looks for averages; these were one run's weights and averages alike.
    (out / "model.safetensors").rename(out / "ema.safetensors")
    written = sorted(file.name for file in out.iterdir())
    again = linked(goldens, tmp_path / "goldens", *(f"hf/{name}" for name in written))
    for name in written:
        (again / "hf" / name).symlink_to(out / name)
    capsys.readouterr()
    assert verify_golden.main(["--goldens", str(again)]) == 0
    assert "all within tolerance" in capsys.readouterr().out.splitlines()[-1]
