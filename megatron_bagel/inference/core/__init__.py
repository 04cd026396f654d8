# SPDX-License-Identifier: Apache-2.0
"""The engine: contexts with caches, guidance, text and pictures."""
