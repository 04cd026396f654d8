# SPDX-License-Identifier: Apache-2.0
"""What tests of runs with sparse experts compare besides numbers: the load of every expert, and how clear the routers' choices were."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_bagel.model.router_statistics import RouterStatistics
from megatron_bagel.training.observability.metrics_file import read_history
from tests.training.equal_runs import Reference, Result

#: A choice of experts is discontinuous. If the last chosen and the first rejected logit of a token differ by less than this, they tie: sums
#: in another order move logits of size 1 by some 1e-7, and may send the token to the other expert. Runs with such a token cannot be
#: compared.
TIE = 1e-6


class RoutedReference(Reference):
    """Runs of one process that also know the smallest margin of a choice of experts in any of their steps."""

    def __init__(self, world: Path, folder: Path) -> None:
        super().__init__(world, folder)
        self.margins: dict[str, float] = {}

    def run(self, flags: Mapping[str, Any]) -> Result:
        """The run of one process with these flags. AssertionError if one of its tokens ties: such a case needs another seed."""
        key = json.dumps(flags, sort_keys=True)
        if key not in self.made:
            file = self.folder / f"{len(self.made)}.margins"
            with margins_in(file):
                super().run(flags)
            self.margins[key] = min(float(line) for line in file.read_text().splitlines())
        margin = self.margins[key]
        assert margin > TIE, f"a token has two logits only {margin:.1e} apart, so layouts need not agree; give the case another global_seed"
        return self.made[key]

    def loads(self, flags: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The loads of each step of that run."""
        return loads_of(self.folder_of(flags))

    def folder_of(self, flags: Mapping[str, Any]) -> Path:
        """Where that run left its results."""
        return self.folder / str(list(self.made).index(json.dumps(flags, sort_keys=True)))


@contextmanager
def margins_in(file: Path) -> Iterator[None]:
    """Let routers of processes forked within the block append the smallest margin of each of their batches to ``file``."""
    count = RouterStatistics.count

    def counted(self: RouterStatistics, logits: torch.Tensor, routing_map: torch.Tensor, topk: int) -> None:
        count(self, logits, routing_map, topk)
        if len(logits):
            best = logits.double().topk(topk + 1, -1).values
            with file.open("a") as lines:
                lines.write(f"{(best[:, -2] - best[:, -1]).min().item()}\n")

    RouterStatistics.count = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        RouterStatistics.count = count  # type: ignore[method-assign]


def loads_of(results: Path) -> list[dict[str, Any]]:
    """The choices that each expert got in each step, by kind and layer."""
    kinds = ("understanding", "generation", "all")
    return [{kind: record[kind]["load"] for kind in kinds if kind in record} for record in read_history(results / "expert_load.jsonl")]
