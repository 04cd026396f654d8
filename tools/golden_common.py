# SPDX-License-Identifier: Apache-2.0
"""How recorded numbers are compared: every element within an absolute plus a relative bound, and the worst one is what is reported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

# Advice of the goldens' README for fp32: elements, and norms or losses.
ELEMENT_ABS, ELEMENT_REL = 2e-5, 1e-4
NORM_REL = 1e-4

Part = TypeVar("Part")


def present(part: Part | None, what: str) -> Part:
    """Return a part that this case needs. Raises ValueError naming ``what`` where there is none."""
    if part is None:
        raise ValueError(f"this case needs a {what}, and there is none")
    return part


@dataclass(frozen=True)
class CaseResult:
    """One case: the worst element's error, the bound that held at that element, and whether all elements kept theirs."""

    name: str
    max_error: float
    tolerance: float
    ok: bool
    detail: str = ""

    def line(self) -> str:
        """The report line of ``verify_golden``."""
        verdict = "FAIL" if not self.ok else "--  " if self.detail.startswith("not covered") else "ok  "
        return f"{verdict} {self.name:<34} max error {self.max_error:.2e} (bound {self.tolerance:.2e}) {self.detail}"


@dataclass
class Comparison:
    """Collects what one case compares; ``result`` sums it up."""

    name: str
    ratio: float = 0.0
    error: float = 0.0
    bound: float = ELEMENT_ABS
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    compared: int = 0

    def close(self, what: str, got: Any, want: Any, absolute: float = ELEMENT_ABS, relative: float = ELEMENT_REL) -> None:
        """Elementwise |got - want| <= absolute + relative |want|, on equal shapes."""
        got, want = _float64(got), _float64(want)
        self.compared += 1
        if got.shape != want.shape:
            self.failures.append(f"{what}: shape {list(got.shape)}, recorded {list(want.shape)}")
            return
        if not want.numel():
            return
        error, bound = (got - want).abs(), absolute + relative * want.abs()
        # NaN compares false with everything: it must not pass for a small error.
        ratio = torch.nan_to_num(error / bound, nan=float("inf"))
        worst = int(ratio.argmax())
        error_there, bound_there = float(error.flatten()[worst]), float(bound.flatten()[worst])
        if float(ratio.flatten()[worst]) >= self.ratio:
            self.ratio, self.error, self.bound = float(ratio.flatten()[worst]), error_there, bound_there
        if bool((ratio > 1).any()):
            self.failures.append(f"{what}: off by {error_there:.2e}")

    def norms(self, what: str, got: Any, want: Any) -> None:
        """Losses, norms, times: relative bound only."""
        self.close(what, got, want, 1e-9, NORM_REL)

    def levels(self, what: str, got: Any, want: Any) -> None:
        """Integer pixels: truncation can fall to either side of an integer, so one level off is allowed and noted."""
        got, want = _float64(got), _float64(want)
        self.compared += 1
        if got.shape != want.shape:
            self.failures.append(f"{what}: shape {list(got.shape)}, recorded {list(want.shape)}")
            return
        off = (got - want).abs()
        if int((off > 1).sum()):
            self.failures.append(f"{what}: off by up to {int(off.max())} levels")
        elif int((off > 0).sum()):
            self.notes.append(f"{what}: {int((off > 0).sum())} of {off.numel()} values one level off by rounding")

    def same(self, what: str, got: Any, want: Any) -> None:
        """Exactly equal values: ids, texts, shapes."""
        self.compared += 1
        if got != want:
            self.failures.append(f"{what}: {got!r}, recorded {want!r}")

    def result(self) -> CaseResult:
        """The case's outcome; a case that compared nothing has failed."""
        if not self.compared:
            self.failures.append("nothing was compared")
        return CaseResult(self.name, self.error, self.bound, not self.failures, "; ".join(self.failures or self.notes))


def _float64(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu().double()
    if isinstance(values, list):
        values = [float(value) if isinstance(value, Tensor) else value for value in values]
    return torch.from_numpy(np.asarray(values, dtype=np.float64))
