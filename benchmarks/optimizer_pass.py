# SPDX-License-Identifier: Apache-2.0
"""Seconds of AdamW and the average of the weights: one after the other, and in one pass, with moments in fp32 and bf16.

    python -m benchmarks.optimizer_pass                  # 64 M weights, as one rank's shard
    python -m benchmarks.optimizer_pass --millions 4 --repeats 3

The ways alternate, and the fastest round counts. A CPU goes through blocks (``training/optim/one_pass.py``), a GPU uses one kernel.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

from benchmarks.record import report  # noqa: E402
from megatron_bagel.training.optim.one_pass import OnePassAdamW, StateDtype  # noqa: E402

DECAY = 0.9999


def make_weights(millions: float, device: str) -> list[torch.nn.Parameter]:
    """Eight flat weights with gradients."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(int(millions * 1e6) // 8, device=device)) for _ in range(8)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return weights


def plain(weights: list[torch.nn.Parameter]) -> Callable[[], None]:
    """AdamW by one kernel per weight and then the average, as the plain optimizer and ``ShardedEma.update`` make them."""
    optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0, fused=True)
    averages = [weight.detach().clone() for weight in weights]

    def step() -> None:
        optimizer.step()
        torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1.0 - DECAY)

    return step


def in_one_pass(weights: list[torch.nn.Parameter], state_dtype: StateDtype) -> Callable[[], None]:
    """The same in one pass."""
    group = {"params": weights, "lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-15, "weight_decay": 0.0}
    optimizer = OnePassAdamW([group], state_dtype)
    optimizer.decay, optimizer.averages = DECAY, {weight: weight.detach().clone() for weight in weights}
    return optimizer.step


def measure(millions: float, repeats: int, device: str) -> dict[str, Any]:
    """Seconds of a step of each way, and bytes of state per weight."""
    ways = {
        "plain": plain(make_weights(millions, device)),
        "one_pass_fp32": in_one_pass(make_weights(millions, device), "fp32"),
        "one_pass_bf16": in_one_pass(make_weights(millions, device), "bf16"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name in [*ways, *list(ways) * repeats]:  # the first round makes the state
        began = time.perf_counter()
        ways[name]()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[name].append(time.perf_counter() - began)
    best = {name: min(rounds[1:]) for name, rounds in seconds.items()}
    state_bytes = {"plain": 8, "one_pass_fp32": 8, "one_pass_bf16": 4}
    return {"millions": millions, "device": device, "seconds": best, "bytes_of_moments_per_weight": state_bytes,
            "times_plain": {name: best["plain"] / value for name, value in best.items()}}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON object, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=64.0, help="millions of weights (default 64)")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    arguments = parser.parse_args(argv)
    if arguments.millions <= 0 or arguments.repeats < 1:
        parser.error("--millions must be positive and --repeats at least 1")
    result = measure(arguments.millions, arguments.repeats, "cuda" if torch.cuda.is_available() else "cpu")
    report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
