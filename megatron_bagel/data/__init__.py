# SPDX-License-Identifier: Apache-2.0
"""From raw files to packs: index, sample plans, planner, transforms, loader, keyed randomness."""
