# SPDX-License-Identifier: Apache-2.0
"""Where the quickstart leaves what it makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class QuickstartFolders:
    """Paths below one output folder. A stage whose result exists is not done again."""

    out: Path

    @property
    def data(self) -> Path:
        """The sample data, with tokenizer, autoencoder and the configs of the model's parts."""
        return self.out / "data"

    @property
    def dataset(self) -> Path:
        """The YAML that names the data."""
        return self.data / "dataset.yaml"

    @property
    def autoencoder(self) -> Path:
        """The autoencoder's weights."""
        return self.data / "vae" / "ae.safetensors"

    @property
    def index(self) -> Path:
        """The index that training reads."""
        return self.out / "index"

    @property
    def latents(self) -> Path:
        """The stored output of the autoencoder."""
        return self.out / "latents"

    @property
    def questions(self) -> Path:
        """The first lesson: ``results`` and ``checkpoints``."""
        return self.out / "questions"

    @property
    def results(self) -> Path:
        """Metrics, curves and sheets of the second lesson."""
        return self.out / "results"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the second lesson."""
        return self.out / "checkpoints"

    @property
    def model(self) -> Path:
        """The exported model folder."""
        return self.out / "model"

    @property
    def exam(self) -> Path:
        """Prompts whose truth is known."""
        return self.out / "exam"

    @property
    def generated(self) -> Path:
        """Pictures and answers of the trained model."""
        return self.out / "generated"

    @property
    def logs(self) -> Path:
        """What the commands printed, one file for each stage."""
        return self.out / "logs"

    @property
    def report(self) -> Path:
        """The page that shows everything."""
        return self.out / "report.html"
