# SPDX-License-Identifier: Apache-2.0
"""Which samples make which pack, and which replica gets it."""
