# SPDX-License-Identifier: Apache-2.0
"""What the training cases of ``golden_train.py`` and ``golden_optimizer.py`` share: a model, recorded batches, a way to run them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from tools.golden_model import GoldenBatch, GoldenModel, Parts, RecordedImageEncoder, load_batch, read_json
from tools.golden_run import Outcome, run

# The batch that most cases are about, and the one that joins it where there are two.
MAIN, SECOND = "flex_0", "flex_1"


class TrainCases:
    """What the cases share: the model, batches by name, the modules with everything trainable."""

    def __init__(self, goldens: Path, model: GoldenModel, backend: str = "sdpa") -> None:
        self.goldens, self.model, self.backend = goldens, model, backend
        self.expected: dict[str, Any] = read_json(goldens / "train" / "expected.json")
        self.batch: Callable[[str], GoldenBatch] = cache(lambda name: load_batch(goldens, name, model.arch))

    @cached_property
    def parts(self) -> Parts:
        """Return the whole model, for every case that leaves it as it is."""
        return self.model.parts()

    def image_encoder(self, parts: Parts, *batches: GoldenBatch) -> RecordedImageEncoder:
        """Return what encodes these batches for these parts."""
        autoencoder = self.model.autoencoder if parts.arch.autoencoder is not None else None
        return RecordedImageEncoder(parts.arch, parts.tower, autoencoder, batches)

    def run(self, parts: Parts, *names: str, **settings: Any) -> Outcome:
        """Run batches, given by name."""
        batches = [self.batch(name) for name in names]
        return run(parts, batches, self.image_encoder(parts, *batches), **{"backend": self.backend, **settings})
