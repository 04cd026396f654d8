# SPDX-License-Identifier: Apache-2.0
"""Prometheus' text file: read back by the rules of its format, whole at every moment, and over when the run is."""

from __future__ import annotations

import math
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from megatron_bagel.training.observability.logging_sinks import RunLog
from megatron_bagel.training.observability.prometheus import Gauges
from tests.training.observability.test_metrics import metrics


def parse(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels) -> value, by Prometheus' own parser. Every sample is a gauge, and no sample stands there twice."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert all(family.type == "gauge" for family in text_string_to_metric_families(text))
    # The writer sorts labels by name; here the run comes first.
    read = {
        (sample.name, tuple(sorted(sample.labels.items(), key=lambda label: (label[0] != "run", label[0])))): sample.value
        for sample in samples
    }
    assert len(read) == len(samples)
    return read


#: Line ends of Unicode are data inside a label; only reading them back by lines here would trip over them.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r\x85\u2028\u2029\x0b\x0c\x1c\x1d\x1e"), max_size=6)
NAMES = st.from_regex(r"[a-z_/]{1,5}", fullmatch=True)


@given(st.dictionaries(st.tuples(NAMES, TEXTS), st.floats(), max_size=12))
def test_every_value_and_label_is_read_back(rows: dict[tuple[str, str], float]) -> None:
    distinct = {(name.replace("/", "_"), label): value for (name, label), value in rows.items()}
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Gauges((name, {"of": label}, value) for (name, label), value in distinct.items()))
    read = parse(generate_latest(registry).decode())
    assert len(read) == len(distinct)
    for (name, label), value in distinct.items():
        back = read["megatron_bagel_" + name, (("of", label),)]
        assert back == value or (math.isnan(back) and math.isnan(value))


def test_a_run_writes_its_newest_numbers_and_says_when_it_is_over(tmp_path: Path) -> None:
    path = tmp_path / "collector/bagel.prom"
    log = RunLog(tmp_path / "results", rank=0, next_step=0, tensorboard=False, prometheus=str(path))
    run = ("run", str(tmp_path / "results"))
    assert parse(path.read_text()) == {("megatron_bagel_running", (run,)): 1.0}
    log.log(metrics(3, ce=math.nan))
    log.log(metrics(4, by_dataset={"ce/vlm": 0.5, "ce/vlm/llava": 0.25}, observed={"time/encode": 0.125, "pack_fill": 0.75}))
    log.log_validation(5, {"model/ce": 2.0})
    read = parse(path.read_text())
    assert read["megatron_bagel_step", (run,)] == 4 and read["megatron_bagel_pack_fill", (run,)] == 0.75
    assert read["megatron_bagel_dataset_ce", (run, ("dataset", "vlm/llava"))] == 0.25
    assert read["megatron_bagel_phase_seconds", (run, ("phase", "encode"))] == 0.125
    assert read["megatron_bagel_validation", (run, ("of", "model/ce"))] == 2.0
    assert read["megatron_bagel_running", (run,)] == 1
    log.close()
    assert parse(path.read_text())["megatron_bagel_running", (run,)] == 0
    assert [file.name for file in path.parent.iterdir()] == ["bagel.prom"] and path.stat().st_mode & 0o004


def test_other_ranks_write_none(tmp_path: Path) -> None:
    RunLog(tmp_path, rank=1, next_step=0, prometheus=str(tmp_path / "bagel.prom")).close()
    assert not list(tmp_path.iterdir())
