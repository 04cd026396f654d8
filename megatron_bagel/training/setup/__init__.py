# SPDX-License-Identifier: Apache-2.0
"""Builds a run from its settings until it is ready for its first step."""
