# SPDX-License-Identifier: Apache-2.0
"""Builds modules and fills them from a folder or a checkpoint, for training and for inference."""
