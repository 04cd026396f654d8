"""Training checkpoints on disk: state, step folders, checksums, local copies."""
