# SPDX-License-Identifier: Apache-2.0
"""The world of coloured shapes: demonstration and test material, not part of the library."""
