# SPDX-License-Identifier: Apache-2.0
"""Log lines, metrics, timers, traces and pictures of a run."""
