# SPDX-License-Identifier: Apache-2.0
"""Detects what goes wrong in a run, reports it, and continues or ends the run."""
