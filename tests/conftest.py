"""Settings every test shares: the CPU platform in place before Megatron-Core is used, one thread, where the goldens lie."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch starts its thread pool: forked ranks inherit it, and two cores are shared by all of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder with numbers recorded from the original implementation; a test that needs it is skipped where it is absent."""
    folder = Path(os.environ.get("MEGATRON_BAGEL_GOLDENS", ROOT.parent / "shared" / "goldens"))
    if not folder.is_dir():
        pytest.skip(f"no goldens at {folder}; set MEGATRON_BAGEL_GOLDENS to their folder")
    return folder
