# SPDX-License-Identifier: Apache-2.0
"""Integers only: what a pack looks like, who attends to whom, which rank holds which token."""
