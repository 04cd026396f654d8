"""``model.safetensors.index.json`` of a folder with one kind of weights: servers read it to learn which files to load.

vllm-omni loads exactly the files that this index names, and sizes its latent table by the tensor that the index points at. In a folder
of averages, as released, it points at ``ema.safetensors``; such an index does not mean that the folder has ``model`` weights.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

from megatron_bagel.checkpoint.hf.safetensors_io import AUTOENCODER_FILE, SafetensorsReader
from megatron_bagel.common.json_files import read_json

SERVER_INDEX = "model.safetensors.index.json"


def points_at_averages(index: Path) -> bool:
    """Return whether ``index`` is named after the model's weights, but names files of averages."""
    if index.name != SERVER_INDEX or not index.is_file():
        return False
    weight_map = read_json(index, "weights").get("weight_map")
    return isinstance(weight_map, dict) and any(str(file).startswith(("ema.", "ema-")) for file in weight_map.values())


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
