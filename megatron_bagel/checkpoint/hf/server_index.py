# SPDX-License-Identifier: Apache-2.0
"""``model.safetensors.index.json`` of a folder with one kind of weights: servers read it to learn which files to load.

vllm-omni loads exactly the files that this index names, and sizes its latent table by the tensor that the index points at. In a folder
of averages, as released, it points at ``ema.safetensors``; such an index does not mean that the folder has ``model`` weights.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader
from megatron_bagel.common.safetensors_header import AUTOENCODER_FILE
from megatron_bagel.config.architecture.weight_files import SERVER_INDEX


def write_server_index(folder: Path, weights: Path) -> None:
    """Write the index of ``weights`` (a file of ``folder``, or the index of its parts) and of the autoencoder, if there is one."""
    readers = [SafetensorsReader(weights, "none")]
    if (folder / AUTOENCODER_FILE).is_file():
        readers.append(SafetensorsReader(folder / AUTOENCODER_FILE, "none"))
    specs = [reader.spec(name) for reader in readers for name in reader.file_names()]
    total = sum(prod(shape) * dtype.itemsize for shape, dtype in specs)
    weight_map = {name: file for reader in readers for name, file in reader.file_names().items()}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (folder / SERVER_INDEX).write_text(text, encoding="utf-8")
