# SPDX-License-Identifier: Apache-2.0
"""Generation equals the recorded cases of the original, and the checker notices when it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.inference.tiny_model import write_tiny_model
from tests.tools.recorded_infer import IMAGE_CASES, write_recorded_cases
from tests.tools.recorded_set import other_arch
from tools.golden_common import Comparison
from tools.golden_infer import run_infer_cases


@pytest.fixture
def golden_model(goldens: Path, tmp_path: Path, single_rank: None):
    from megatron_bagel.inference.core.load_engine import load_engine

    folder = shutil.copytree(goldens / "hf", tmp_path / "hf")
    extra = json.loads((goldens / "hf" / "tiny_extra.json").read_text())
    (folder / "ae_config.json").write_text(json.dumps(extra["ae"]))
    return load_engine(folder)


def test_every_recorded_case(goldens: Path, golden_model) -> None:
    results = run_infer_cases(goldens, golden_model)
    assert not [result.line() for result in results if not result.ok]
    covered = [result for result in results if "not covered" not in result.detail]
    assert len(covered) == len(results) - 2
    # A wrong weight must not pass.
    with torch.no_grad():
        golden_model.decoder.llm2vae.weight.mul_(1.001)
    assert any(not result.ok for result in run_infer_cases(goldens, golden_model))


def test_another_model_size(tmp_path: Path, single_rank: None) -> None:
    """Nothing of the tiny model's sizes is in the checker: widths, latent patches, autoencoder, tables come from the files."""
    from megatron_bagel.inference.core.load_engine import load_engine

    model = load_engine(write_tiny_model(tmp_path, other_arch()))
    folder = write_recorded_cases(tmp_path, model)
    results = run_infer_cases(folder, model)
    assert len(results) == 4 and not [result.line() for result in results if not result.ok]
    with torch.no_grad():
        model.decoder.llm2vae.weight.mul_(1.001)
    assert [result.name for result in run_infer_cases(folder, model) if not result.ok] == [f"infer/{name}" for name in IMAGE_CASES]


def test_comparison_reports_the_worst_and_refuses_nan_and_nothing() -> None:
    check = Comparison("x")
    check.close("a", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]))
    result = check.result()
    assert not result.ok and result.max_error == pytest.approx(0.1, rel=1e-4) and "a: off by" in result.detail
    check = Comparison("nan")
    check.close("a", torch.tensor([float("nan")]), torch.tensor([1.0]))
    assert not check.result().ok
    assert not Comparison("empty").result().ok
