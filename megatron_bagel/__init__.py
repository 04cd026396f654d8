# SPDX-License-Identifier: Apache-2.0
"""Training and generation with BAGEL-style unified multimodal models on Megatron-Core."""

__version__ = "0.2.0"
