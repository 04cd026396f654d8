# SPDX-License-Identifier: Apache-2.0
"""The benchmark of layouts runs what it names: the same training, on other processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.parallel_step import main
from benchmarks.record import read_record


@pytest.mark.slow
@pytest.mark.distributed
def test_layouts_train_the_same(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    main(["one", "dp2", "pp2", "--steps", "1", "--warmup", "1", "--output", str(out)])
    layouts = read_record(out).figures["layouts"]
    assert [layouts[name]["processes"] for name in ("one", "dp2", "pp2")] == [1, 2, 2]
    for name in ("dp2", "pp2"):
        assert layouts[name]["loss"] == pytest.approx(layouts["one"]["loss"], rel=1e-4)
        assert layouts[name]["speedup"] > 0 and layouts[name]["step_s"] > 0


def test_an_unknown_layout_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["dp3"])
    assert "there are one, dp2" in capsys.readouterr().err
