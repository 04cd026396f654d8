# SPDX-License-Identifier: Apache-2.0
"""Many prompts from files, and their results on disk."""
