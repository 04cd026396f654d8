"""What a training step costs in arithmetic and memory; planning and training read the same formulas."""
