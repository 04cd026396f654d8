# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints on disk: state, step folders, checksums, local copies."""
