# SPDX-License-Identifier: Apache-2.0
"""The training loop and its steps, with losses, optimizer, moving average, schedule, evaluation and metrics."""
