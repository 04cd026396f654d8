"""Reading and writing `ae.safetensors`, closed against wrong files: nothing missing, nothing left over, every shape right.

A file may store bf16 or fp16 to be small; the module is fp32 whatever the file holds.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_bagel.common.wording import shorten
from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.encoders.autoencoder import AutoEncoder


def _check_tensors(path: Path, found: dict[str, torch.Size], expected: dict[str, torch.Size]) -> None:
    missing = sorted(expected.keys() - found.keys())
    left_over = sorted(found.keys() - expected.keys())
    shared = sorted(found.keys() & expected.keys())
    wrong = [f"{name} is {list(found[name])}, expected {list(expected[name])}" for name in shared if found[name] != expected[name]]
    problems = [
        f"{label}: {shorten(names)}"
        for label, names in (("missing tensors", missing), ("left-over tensors", left_over), ("wrong shapes", wrong))
        if names
    ]
    if problems:
        raise ValueError(
            f"autoencoder: {path} does not fit this architecture; {'; '.join(problems)}. Widths and depths other than FLUX's are "
            f"read from an ae_config.json beside the weights ({path.parent / 'ae_config.json'})"
        )


def load_autoencoder(path: str | Path, arch: AutoencoderArch | None = None, flag: str = "--vae_path") -> AutoEncoder:
    """The autoencoder of a safetensors file: fp32, in eval mode, without gradients.

    Args:
        path: the weights, usually `ae.safetensors`.
        arch: its shape; None reads `ae_config.json` beside the file and falls back to FLUX's.
        flag: what the user set to get here, for error messages.

    Raises:
        ValueError: no such file, not safetensors, or any tensor missing, left over or of another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"autoencoder: {flag} {path} is not a file; it must be the autoencoder's weights (ae.safetensors)")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"autoencoder: {flag} {path} cannot be read as safetensors ({error}); is the download complete?") from error
    with torch.device("meta"):
        model = AutoEncoder(arch or AutoencoderArch.beside(path))
    _check_tensors(path, {n: t.shape for n, t in tensors.items()}, {n: t.shape for n, t in model.state_dict().items()})
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)


def save_autoencoder(model: AutoEncoder, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the weights as `dtype` and, beside them, `ae_config.json` with the architecture. Makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}, path)
    (path.parent / "ae_config.json").write_text(json.dumps(model.arch.to_dict(), indent=1) + "\n", encoding="utf-8")
