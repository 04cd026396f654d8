# SPDX-License-Identifier: Apache-2.0
"""Files that the sample world needs and no program makes quickly: a small autoencoder, and the settings of its trainings."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
#: FLUX's architecture at a width of 64, trained on the sample world alone by ``examples/small_world/train_autoencoder.py``.
AUTOENCODER = FOLDER / "vae"
#: Settings to train everything at once, as the guide of first steps does.
TRAIN_CONFIG = FOLDER / "train.yaml"
#: Settings of the quickstart's two lessons.
QUESTIONS_CONFIG = FOLDER / "questions.yaml"
PICTURES_CONFIG = FOLDER / "pictures.yaml"
