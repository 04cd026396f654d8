# SPDX-License-Identifier: Apache-2.0
"""Attention backends: each takes the tokens of a rank in expert-sorted order and equals the dense oracle."""
