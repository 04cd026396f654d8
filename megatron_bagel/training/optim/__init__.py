# SPDX-License-Identifier: Apache-2.0
"""The optimizer, the moving average of the weights, and the learning rate."""
