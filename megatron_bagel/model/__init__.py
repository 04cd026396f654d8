# SPDX-License-Identifier: Apache-2.0
"""The decoder: layer specs, the expert-sorted layers, attention with its backends, and flow matching."""
