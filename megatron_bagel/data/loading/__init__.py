# SPDX-License-Identifier: Apache-2.0
"""From planned packs to tensors in the training process."""
