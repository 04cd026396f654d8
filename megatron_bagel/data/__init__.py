"""From raw files to packs: index, sample plans, planner, transforms, loader, keyed randomness."""
