# SPDX-License-Identifier: Apache-2.0
"""The commands of ``megatron-bagel data``. They build, merge, verify and show an index, and make sample data, latents and tokenizers."""
