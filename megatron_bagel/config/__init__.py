# SPDX-License-Identifier: Apache-2.0
"""Settings of a run: dataclasses that are command-line flags and YAML keys at once, checks that name the fix, and the shape of a model."""
