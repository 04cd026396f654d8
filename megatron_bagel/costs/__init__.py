# SPDX-License-Identifier: Apache-2.0
"""What a training step costs in arithmetic and memory; planning and training read the same formulas."""
