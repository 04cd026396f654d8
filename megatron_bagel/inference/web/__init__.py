# SPDX-License-Identifier: Apache-2.0
"""The page on which people draw, edit and ask."""
