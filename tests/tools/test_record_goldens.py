# SPDX-License-Identifier: Apache-2.0
"""The recorder of goldens: what stands in for kernels is attention, sizes can be chosen, two sets are compared number by number; and with a
checkout of the original (``MEGATRON_BAGEL_REFERENCE``) and its environment the recorded set is that of ``tests/goldens``."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from tests.docs.commands import ROOT
from tools.record_goldens.__main__ import main, report
from tools.record_goldens.attention import WholeMask, masked_attention, varlen_attention, whole_mask
from tools.record_goldens.files import compare_sets
from tools.record_goldens.model import ModelSettings, fill

GOLDENS = ROOT / "tests" / "goldens"


@pytest.mark.parametrize("causal", [False, True])
def test_sequences_end_to_end_are_attended_alone(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(9, heads, 8, generator=generator) for heads in (4, 2, 2))
    ends = torch.tensor([0, 4, 9])
    out = varlen_attention(query, key, value, ends, ends, 5, 5, causal=causal)
    for first, last in ((0, 4), (4, 9)):
        parts = [part[first:last].transpose(0, 1)[None] for part in (query, key, value)]
        expected = functional.scaled_dot_product_attention(*parts, is_causal=causal, enable_gqa=True)[0].transpose(0, 1)
        torch.testing.assert_close(out[first:last], expected)


def test_a_causal_query_sees_a_longer_cache_to_its_end() -> None:
    """A query after a cache of two keys sees both and itself, as flash-attn aligns the mask."""
    key = torch.zeros(3, 1, 2)
    value = torch.arange(6.0).reshape(3, 1, 2)
    out = varlen_attention(torch.zeros(1, 1, 2), key, value, torch.tensor([0, 1]), torch.tensor([0, 3]), 1, 3, causal=True)
    torch.testing.assert_close(out[0, 0], value.mean(0)[0])


def test_a_rule_becomes_a_mask_that_attention_obeys() -> None:
    mask = whole_mask(lambda batch, head, query, key: key <= query, 1, None, 5, 5, device="cpu")
    assert isinstance(mask, WholeMask) and torch.equal(mask.allowed, torch.ones(5, 5, dtype=torch.bool).tril())
    query, key, value = (torch.randn(1, heads, 5, 8) for heads in (4, 2, 2))
    expected = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(masked_attention(query, key, value, enable_gqa=True, block_mask=mask), expected)


def test_sizes_are_the_templates_but_for_what_is_set() -> None:
    settings = ModelSettings.of_folder(GOLDENS / "hf", {"llm.hidden_size": 192, "ae.ch": 64})
    assert (settings.llm["hidden_size"], settings.llm["num_hidden_layers"], settings.ae["ch"]) == (192, 4, 64)
    with pytest.raises(ValueError, match=r"--set llm.width: there is no such setting"):
        ModelSettings.of_folder(GOLDENS / "hf", {"llm.width": 1})


def test_the_weights_of_a_seed_are_those_of_the_set() -> None:
    """The rule of the weights gives the autoencoder of tests/goldens from the set's default seed; a module with these names is enough."""

    class Named(torch.nn.Module):
        def __init__(self, weights: dict[str, torch.Tensor]) -> None:
            super().__init__()
            self.weights = weights

        def named_parameters(self, *args: object, **kwargs: object):
            yield from self.weights.items()

    recorded = load_file(GOLDENS / "hf/ae.safetensors")
    again = Named({name: torch.zeros_like(value) for name, value in recorded.items()})
    fill(again, 1235)
    assert all(torch.equal(again.weights[name], value) for name, value in recorded.items())


def test_two_sets_are_compared_number_by_number(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "a.json").write_text(json.dumps({"loss": 2.0, "ids": [1, 2], "name": "x"}))
        save_file({"t": torch.tensor([1.0, float("-inf")])}, folder / "b.safetensors")
    assert all(difference.largest == 0 for difference in compare_sets(one, other)) and report(one, other) == 0
    (other / "a.json").write_text(json.dumps({"loss": 2.0 + 4e-6, "ids": [1, 2], "name": "x"}))
    save_file({"t": torch.tensor([1.0 + 2e-6, float("-inf")])}, other / "b.safetensors")
    assert {difference.file: difference.place for difference in compare_sets(one, other)} == {"a.json": "/loss", "b.safetensors": "t"}
    assert report(one, other) == 1 and "2 more than 1e-06 apart" in capsys.readouterr().out
    (other / "a.json").write_text(json.dumps({"loss": 2.0, "ids": [1], "name": "x"}))
    (other / "c.json").write_text("{}")
    assert [difference.file for difference in compare_sets(one, other) if math.isinf(difference.largest)] == ["a.json", "c.json"]


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGATRON_BAGEL_REFERENCE", raising=False)
    assert main(["--output", str(tmp_path / "new")]) == 2 and "give a checkout" in capsys.readouterr().err
    assert main(["--output", str(tmp_path), "--reference", "x"]) == 2 and "it exists" in capsys.readouterr().err
    words = ["--output", str(tmp_path / "new"), "--reference", str(tmp_path)]
    assert main([*words, "--set", "llm.hidden_size"]) == 2 and "PART.NAME=VALUE" in capsys.readouterr().err
    assert main(words) == 2 and "modeling/bagel/bagel.py" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif("MEGATRON_BAGEL_REFERENCE" not in os.environ, reason="needs a checkout of the original: MEGATRON_BAGEL_REFERENCE")
def test_the_recorded_set_is_that_of_the_repository(tmp_path: Path) -> None:
    """``MEGATRON_BAGEL_RECORDER`` names the interpreter of the original's environment (tools/record_goldens/README.md)."""
    python = os.environ.get("MEGATRON_BAGEL_RECORDER") or shutil.which("python3")
    words = ["-m", "tools.record_goldens", "--output", str(tmp_path / "set"), "--check", str(GOLDENS), "--tolerance", "1e-5"]
    done = subprocess.run([str(python), "-W", "ignore", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
