# SPDX-License-Identifier: Apache-2.0
"""Held-out losses and sample pictures during training."""
