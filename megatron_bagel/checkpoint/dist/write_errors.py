# SPDX-License-Identifier: Apache-2.0
"""What torch's errors of a failed write say, without the tracebacks that are part of their text."""

from __future__ import annotations


def write_reasons(error: BaseException) -> str:
    """Return the reason of each rank that failed, once and in one line each, or that of ``error`` itself."""
    failures = getattr(error, "failures", None) or {0: error}  # of a CheckpointException: rank -> (error, stack)
    reasons = (str(failure[0] if isinstance(failure, tuple) else failure) for failure in failures.values())
    return "; ".join(dict.fromkeys(reason.strip().partition("\n")[0] for reason in reasons))
