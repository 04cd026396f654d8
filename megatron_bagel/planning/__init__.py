# SPDX-License-Identifier: Apache-2.0
"""Predicts what a run needs: memory, work, traffic and time by formula, and dry runs of one rank without weights."""
