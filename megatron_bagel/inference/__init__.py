# SPDX-License-Identifier: Apache-2.0
"""Text and image generation from a context of text and images."""
