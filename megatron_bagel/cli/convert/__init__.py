# SPDX-License-Identifier: Apache-2.0
"""The commands of ``megatron-bagel convert``: between training checkpoints and model folders."""
