# SPDX-License-Identifier: Apache-2.0
"""Replacements that let Megatron-Core run on machines without a GPU."""
