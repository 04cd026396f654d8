# SPDX-License-Identifier: Apache-2.0
"""Says early that a run is going wrong, although every step is fine by itself. Each warning comes once, with what to do about it.

Warnings are events (``events.jsonl``) and lines of the log. They change nothing in the run. ``bad_steps.py`` judges single steps.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from megatron_bagel.training.hooks import StepHook
from megatron_bagel.training.resilience.events import EVENTS, EventFile
from megatron_bagel.training.step_result import StepDone

#: Steps whose median loss a jump is compared with, and the fewest of them.
_HISTORY, _MIN_HISTORY = 50, 10
#: A loss above this many times the recent median is a jump.
_JUMP = 2.0
#: Steps, or logged steps for dataset groups, after which what has not come yet is missed.
_PATIENCE = 50
#: How far a held-out loss must be above its best value, and how far the first loss may be from the starting weights'.
_RISE, _FIRST = 1.05, 1.5


@dataclass(frozen=True)
class WarningSettings:
    """What the warnings of a run depend on.

    Attributes:
        results_dir: The folder of ``events.jsonl``, where earlier warnings of the run are.
        total_steps: The steps of the run.
        lr: The peak learning rate.
        safe_lr: The largest rate that is usual for what trains; None for a run that starts from random weights or pretrained parts.
        ema_decay: The decay of the average.
        expects_gen: Whether the run trains on tokens to generate.
        expects_und: Whether the run trains on text or images to understand.
    """

    results_dir: Path
    total_steps: int
    lr: float
    safe_lr: float | None
    ema_decay: float
    ema_warmup: bool = False
    expects_gen: bool = True
    expects_und: bool = True


class RunWarnings(StepHook):
    """Watches a run from its settings, its losses and its evaluations. It never communicates; only rank 0 writes."""

    def __init__(self, settings: WarningSettings, events: EventFile) -> None:
        self._settings, self._events = settings, events
        self._said: set[str] = set()
        self._losses: deque[float] = deque(maxlen=_HISTORY)
        self._tokens: Counter[str] = Counter()
        self._groups: dict[str, int] = {}
        self._steps = self._logged_steps = 0
        self._since_evaluation: dict[str, list[float]] = {"ce": [], "mse": []}
        self._evaluations: dict[str, list[tuple[float, float]]] = {"ce": [], "mse": []}
        self._starting: Mapping[str, float] = {}

    def start(self) -> None:
        """Compare the settings with the length of the run."""
        file = self._settings.results_dir / EVENTS
        if file.is_file():
            # Not read as JSON: a killed run may have left half a line, which must not keep the next one from starting.
            self._said = set(re.findall(r'"event": "(\w+)"', file.read_text(encoding="utf-8", errors="replace")))
        settings, left = self._settings, self._settings.ema_decay**self._settings.total_steps
        horizon = 1 / max(1 - settings.ema_decay, 1e-12)
        if settings.ema_decay and horizon > settings.total_steps and not settings.ema_warmup:
            better = round(0.01 ** (1 / settings.total_steps), 6)
            self._say(
                0, "ema_horizon",
                f"the average of --ema {settings.ema_decay} looks back {horizon:,.0f} steps, and the run has {settings.total_steps:,}: "
                f"at its end {left:.0%} of the average are still the starting weights. Use --ema {better:g}, which leaves 1 %, or "
                "--ema auto",
            )  # fmt: skip
        if settings.safe_lr is not None and settings.lr > settings.safe_lr:
            self._say(
                0, "high_lr",
                f"--lr {settings.lr:g} is high for weights that are trained already: it may undo what they know before it teaches "
                f"anything. Usual rates are up to {settings.safe_lr:g}; try that first",
            )  # fmt: skip

    def after_step(self, done: StepDone) -> None:
        """Look at the losses and the tokens of a step."""
        result, step = done.result, done.step
        if step == 0:
            self._compare_first(result.losses.ce, result.losses.mse, bool(result.totals.ce_tokens), bool(result.totals.mse_tokens))
        if len(self._losses) >= _MIN_HISTORY and result.losses.loss > _JUMP * (recent := median(self._losses)):
            self._say(
                step, "loss_jump",
                f"the loss jumped to {result.losses.loss:.4g}, more than {_JUMP:g} times the recent {recent:.4g}. If it does not come "
                "back within a few steps, resume from an earlier checkpoint with a lower --lr; --loss_spike_factor leaves such updates out",
            )  # fmt: skip
        self._losses.append(result.losses.loss)
        for name, count in (("ce", result.totals.ce_tokens), ("mse", result.totals.mse_tokens)):
            if count:
                self._since_evaluation[name].append(getattr(result.losses, name))
        self._count(done)

    def _count(self, done: StepDone) -> None:
        """Count tokens by expert and samples by group, and miss what has not come after a while."""
        result, work = done.result, done.result.work
        self._steps += 1
        self._tokens.update(gen=work.vae_tokens, und=work.tokens - work.vae_tokens)
        if self._steps == _PATIENCE:
            expected = {"gen": self._settings.expects_gen, "und": self._settings.expects_und}
            for expert in (name for name, is_expected in expected.items() if is_expected and not self._tokens[name]):
                other = "--visual_gen False" if expert == "gen" else "--visual_und False"
                self._say(
                    done.step, f"idle_{expert}",
                    f"no token has reached the expert {expert} in {_PATIENCE} steps, so it does not train: check the dataset groups and "
                    f"their weights, or leave its part out with {other}",
                )  # fmt: skip
        if result.tasks is not None:
            self._logged_steps += 1
            for group, samples in result.tasks.samples.items():
                self._groups[group] = self._groups.get(group, 0) + samples
            if self._logged_steps == _PATIENCE:
                for group in (name for name, samples in self._groups.items() if not samples):
                    self._say(
                        done.step, "absent_group_" + re.sub(r"\W", "_", group),
                        f"no sample of the dataset group {group!r} came in {_PATIENCE} logged steps: raise its weight if it is small, and "
                        "--max_num_tokens_per_sample if its samples are longer (`megatron-bagel data stats` tells)",
                    )  # fmt: skip

    def evaluated(self, steps: int, numbers: Mapping[str, float]) -> None:
        """Compare held-out losses with earlier ones: those that rise while the training loss falls mean overfitting."""
        if steps == 0:
            self._starting = dict(numbers)
            return
        for name, history in self._evaluations.items():
            held_out, trained = numbers.get(f"model/{name}"), self._since_evaluation[name]
            if held_out is None or not trained:
                continue
            history.append((held_out, fmean(trained)))
            trained.clear()
            best, trained_then = min(history)
            if len(history) >= 3 and history[-2][0] > best and held_out > _RISE * best and history[-1][1] < trained_then:
                self._say(
                    steps, "overfitting",
                    f"the held-out {name} has risen from {best:.4g} to {held_out:.4g} while the training loss fell from {trained_then:.4g} "
                    f"to {history[-1][1]:.4g}: the model learns the samples by heart. Take the best checkpoint, and use more data, fewer "
                    "steps or a smaller --lora_rank",
                )  # fmt: skip

    def _compare_first(self, ce: float, mse: float, has_ce: bool, has_mse: bool) -> None:
        """Compare the first losses with those of the starting weights on held-out rows, if these were evaluated."""
        for name, value, is_there in (("ce", ce, has_ce), ("mse", mse, has_mse)):
            before = self._starting.get(f"model/{name}")
            if is_there and before and not 1 / _FIRST < value / before < _FIRST:
                self._say(
                    0, f"first_{name}",
                    f"the first {name} of training is {value:.4g}, and that of the same weights on held-out rows {before:.4g}: training "
                    "data and held-out rows differ in kind, or the batch is very small. Look at both (`megatron-bagel data inspect`), or "
                    "raise --global_batch_size",
                )  # fmt: skip

    def _say(self, step: int, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._events.write(step, kind, text)
