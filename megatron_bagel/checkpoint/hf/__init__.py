# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders in the released format, and the table that maps their names to ours."""
