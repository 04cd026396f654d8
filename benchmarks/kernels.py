# SPDX-License-Identifier: Apache-2.0
"""Where a GPU's time goes: kernels by time, their launches, and the share of time in which no kernel ran."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import profile

from megatron_bagel import platform
from megatron_bagel.platform.device import profiled_activities, synchronize

#: Kernels that are listed by name; the others are summed.
LISTED = 25


def kernel_profile(work: Callable[[], object]) -> dict[str, Any]:
    """Profile ``work`` once. On a CPU there are no kernels, and the operators are listed in their place."""
    synchronize()
    with profile(activities=profiled_activities()) as profiler:
        work()
        synchronize()
    if not platform.has_gpu():
        spent = {event.key: (event.self_cpu_time_total, event.count) for event in profiler.key_averages()}
        return {"of": "operators", **_table([(name, seconds, count) for name, (seconds, count) in spent.items()])}
    kernels = device_events(profiler.events())
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        by_name[event.name].append(event.time_range.end - event.time_range.start)
    spans = [(event.time_range.start, event.time_range.end) for event in kernels]
    return {"of": "kernels", "idle_share": idle_share(spans), **_table([(name, sum(each), len(each)) for name, each in by_name.items()])}


def device_events(events: Iterable[Any]) -> list[Any]:
    """Return what ran on the GPU: kernels and copies. Annotations, such as the optimizer's step, only span them and are left out."""
    return [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]


def idle_share(spans: Iterable[tuple[float, float]]) -> float:
    """Return the share of the time from the first start to the last end that no span covers."""
    ordered = sorted(spans)
    if not ordered:
        return 1.0
    covered, last_end = 0.0, ordered[0][0]
    for start, end in ordered:
        covered += max(0.0, end - max(start, last_end))
        last_end = max(last_end, end)
    return 1 - covered / (last_end - ordered[0][0])


def _table(rows: Sequence[tuple[str, float, int]]) -> dict[str, Any]:
    """The table of (name, microseconds, calls), longest first."""
    ordered = sorted(rows, key=lambda row: -row[1])
    total = sum(row[1] for row in rows)
    listed = [{"name": name[:120], "ms": micro / 1e3, "share": micro / total, "calls": calls} for name, micro, calls in ordered[:LISTED]]
    rest = ordered[LISTED:]
    return {
        "ms": total / 1e3, "calls": sum(row[2] for row in rows), "longest": listed,
        "others": {"ms": sum(row[1] for row in rest) / 1e3, "calls": sum(row[2] for row in rest)},
    }  # fmt: skip
