# SPDX-License-Identifier: Apache-2.0
"""The memory-mapped index: how it is built, checked and read."""
