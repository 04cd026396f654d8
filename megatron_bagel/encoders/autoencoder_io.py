# SPDX-License-Identifier: Apache-2.0
"""Reads and writes ``ae.safetensors`` and refuses wrong files: no tensor may be missing, unexpected or of another shape.

A file may store bf16 or fp16 to be small; the module is always fp32.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_bagel.checkpoint.hf.finite_weights import WeightCheck
from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader
from megatron_bagel.common.wording import shorten
from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.encoders.autoencoder import AutoEncoder


def _check_tensors(path: Path, actual_shapes: dict[str, torch.Size], expected_shapes: dict[str, torch.Size]) -> None:
    missing_names = sorted(expected_shapes.keys() - actual_shapes.keys())
    unexpected_names = sorted(actual_shapes.keys() - expected_shapes.keys())
    shared_names = sorted(actual_shapes.keys() & expected_shapes.keys())
    shape_errors = [
        f"{name} is {list(actual_shapes[name])}, expected {list(expected_shapes[name])}"
        for name in shared_names
        if actual_shapes[name] != expected_shapes[name]
    ]
    problems = [
        f"{label}: {shorten(names)}"
        for label, names in (
            ("missing tensors", missing_names),
            ("unexpected tensors", unexpected_names),
            ("wrong shapes", shape_errors),
        )  # fmt: skip
        if names
    ]
    if problems:
        raise ValueError(
            f"autoencoder: {path} does not match this architecture; {'; '.join(problems)}. Widths and depths other than FLUX's are "
            f"read from an ae_config.json beside the weights ({path.parent / 'ae_config.json'})"
        )


def load_autoencoder(
    path: str | Path, arch: AutoencoderArch | None = None, flag: str = "--vae_path", check_weights: WeightCheck = "sampled"
) -> AutoEncoder:
    """Load the autoencoder from a safetensors file: fp32, in eval mode, without gradients.

    Args:
        path: The weights, usually ``ae.safetensors``.
        arch: The architecture; None reads ``ae_config.json`` beside the file and falls back to FLUX's.
        flag: The flag that set the path, for error messages.
        check_weights: How many values are checked to be finite.

    Raises:
        ValueError: If the file does not exist or is not safetensors, or any tensor is missing, unexpected, of another shape or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"autoencoder: {flag} {path} is not a file; it must be the autoencoder's weights (ae.safetensors)")
    try:
        source = SafetensorsReader(path, check_weights)
        names = source.keys()
        shapes = {name: torch.Size(source.spec(name)[0]) for name in names}
    except ValueError as error:
        raise ValueError(f"autoencoder: {flag} {error}") from error
    with torch.device("meta"):
        model = AutoEncoder(arch or AutoencoderArch.beside(path))
    _check_tensors(path, shapes, {name: tensor.shape for name, tensor in model.state_dict().items()})
    model.load_state_dict({name: source.get(name).float() for name in names}, assign=True)
    return model.eval().requires_grad_(False)


def save_autoencoder(model: AutoEncoder, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the weights as ``dtype`` and, beside them, ``ae_config.json`` with the architecture. Creates the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}, path)
    (path.parent / "ae_config.json").write_text(json.dumps(model.arch.to_dict(), indent=1) + "\n", encoding="utf-8")
