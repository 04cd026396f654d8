# SPDX-License-Identifier: Apache-2.0
"""A folder with the names and shapes of the released model, 29 GB of bf16: into a checkpoint and back, bit for bit, as JSON.

    python -m benchmarks.released_size --folder DISK --output benchmarks/results/released-size.json

Reported are peak memory and seconds of both directions beside copies of 4 GB of the same file, and the bytes that a rank of tensor 4 x
pipeline 2 reads of the folder beside its share of the weights. Copies read from the disk, as the converters do: the page cache is
emptied of the file first. The disk needs room for two such folders. ``--zero-layers N`` makes every N-th layer zeros, which files hold
without room, where the disk is smaller. All files are removed in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint import _module, copy_seconds, run_measured
from benchmarks.record import report
from megatron_bagel import platform
from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader
from megatron_bagel.checkpoint.hf.weight_map import Entry, WeightMap
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch, ViTArch

SPARE_BYTES = 8e9  # kept free: other programs write to the disk too
COPIED_BYTES = 4_000_000_000
TENSOR, PIPELINE = 4, 2
_PERIOD = 4_194_301  # a prime: rows of no width begin alike


def released_arch() -> BagelArch:
    """The released model: 1,223 tensors, 14.6 billion parameters."""
    llm, vit = LLMArch(3584, 18944, 28, 28, 4, 152064), ViTArch(1152, 4304, 27, 16, image_size=980)
    return BagelArch(llm, vit, AutoencoderArch(ch=32), max_latent_size=64)


class Values:
    """The bits of every weight, a function of its name: random, or zeros in every ``zero_layers``-th layer."""

    def __init__(self, zero_layers: int) -> None:
        self._zero_layers = zero_layers
        self._noise = torch.randn(_PERIOD, generator=torch.Generator().manual_seed(1)).bfloat16()

    def of(self, entry: Entry) -> torch.Tensor:
        """The full tensor of one of our parameters."""
        parts = entry.name.split(".")
        if self._zero_layers and parts[:2] == ["decoder", "layers"] and int(parts[2]) % self._zero_layers == 0:
            return torch.zeros(entry.shape, dtype=torch.bfloat16)
        size, start = torch.Size(entry.shape).numel(), zlib.crc32(entry.name.encode()) % _PERIOD
        return self._noise.repeat(-(-(size + start) // _PERIOD))[start : start + size].view(entry.shape)


def needed_bytes(zero_layers: int) -> float:
    """The room that both folders need, and what stays free for others."""
    from megatron_bagel.checkpoint.hf.folder import WeightFile

    weight_map = WeightMap(released_arch())
    whole = WeightFile(torch.zeros, "bf16").bytes(weight_map)
    layer = sum(2 * torch.Size(entry.shape).numel() for name, entry in weight_map.entries.items() if name.startswith("decoder.layers.0."))
    zeros = layer * -(-28 // zero_layers) if zero_layers else 0
    return max(2 * whole - zeros, whole + 2 * COPIED_BYTES) + SPARE_BYTES


def write_input(folder: Path, values: Values) -> None:
    """The folder as released: one weight file."""
    from megatron_bagel.checkpoint.hf.folder import WeightFile, write_folder
    from megatron_bagel.encoders.autoencoder import AutoEncoder
    from megatron_bagel.encoders.autoencoder_io import save_autoencoder
    from megatron_bagel.model.positions import sincos_2d
    from megatron_bagel.sample_world.tokenizer_training import train_tokenizer

    arch = released_arch()
    entries = WeightMap(arch).entries
    train_tokenizer(["a few words"], folder.parent / "tokenizer", 300)
    save_autoencoder(AutoEncoder(AutoencoderArch(ch=32)), folder.parent / "ae" / "ae.safetensors")
    files = {"ema": WeightFile(lambda name: values.of(entries[name]))}
    write_folder(folder, arch, files, sincos_2d, folder.parent / "tokenizer", folder.parent / "ae" / "ae.safetensors")


def dig_holes(file: Path) -> None:
    """Give the room of zeros in a file back to the disk."""
    subprocess.run(["fallocate", "--dig-holes", str(file)], check=True)


def rank_main(rank: int, folder: Path) -> dict[str, float]:
    """Load the share of one rank, alone in a world of ranks that do not exist; bytes read and bytes held."""
    platform.install()
    from megatron.core import parallel_state

    from megatron_bagel.assembly.modules import BuildSettings, build_modules
    from megatron_bagel.checkpoint.hf.folder import HFFolder
    from megatron_bagel.checkpoint.hf.load import load_weights
    from megatron_bagel.config.megatron_arguments import MegatronArguments
    from megatron_bagel.config.transformer_config import transformer_config
    from megatron_bagel.costs.freezing import FreezeSettings
    from megatron_bagel.platform.launch.fake_world import fake_world

    megatron = MegatronArguments(tensor_model_parallel_size=TENSOR, pipeline_model_parallel_size=PIPELINE)
    with fake_world(rank, TENSOR * PIPELINE):
        parallel_state.initialize_model_parallel(TENSOR, PIPELINE, create_gloo_process_groups=False)
        source = HFFolder(folder)
        arch = source.arch
        modules = build_modules(BuildSettings(megatron, FreezeSettings(), None), arch, transformer_config(arch.llm, megatron, bf16=True))
        parts = list(modules.named.values())
        before = _bytes_read()
        load_weights(source.weights(), WeightMap(arch), parts)
        read = _bytes_read() - before
        held = sum(parameter.nbytes for part in parts for parameter in part.parameters())
    return {"rank": rank, "read_bytes": read, "share_bytes": held, "read_over_share": read / held}


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def equal(weights: Path, values: Values) -> bool:
    """Whether a weight file holds every weight with the bits that went in."""
    reader, entries = SafetensorsReader(weights, "none"), WeightMap(released_arch()).entries
    return all(torch.equal(entry.fuse([reader.get(name) for name in entry.hf]), values.of(entry)) for entry in entries.values())


def measure(folder: Path, zero_layers: int) -> dict[str, Any]:
    """Both directions, and what ranks read. The input's weights are removed before the way back."""
    source, values = folder / "hf", Values(zero_layers)
    write_input(source, values)
    weights = source / "ema.safetensors"
    size = weights.stat().st_size
    copies = [_copy_part(weights, folder / "copied")]
    if zero_layers:
        dig_holes(weights)
    drop_from_cache(weights)
    ranks = [_rank(rank, source) for rank in (0, TENSOR * PIPELINE - 1)]
    start = run_measured("from megatron_bagel import platform; platform.install(); import megatron_bagel.checkpoint.convert")
    arguments = ["--model", str(source), "--output", str(folder / "checkpoint")]
    to_megatron = run_measured(_module("tools.checkpoint_convert.hf_to_megatron"), arguments)
    weights.unlink()
    for file in (folder / "checkpoint").rglob("*.distcp") if zero_layers else ():
        dig_holes(file)
    copies.append(_copy_part(next((folder / "checkpoint").rglob("*.distcp")), folder / "copied"))
    arguments = ["--checkpoint", str(folder / "checkpoint"), "--output", str(folder / "back")]
    to_hf = run_measured(_module("tools.checkpoint_convert.megatron_to_hf"), arguments)
    is_equal = equal(folder / "back/ema.safetensors", values)
    return {
        "weight_bytes": size, "zero_layers": zero_layers, "equal_after_both": is_equal, "start_s": start["wall_s"],
        "copy_seconds_of_that_size": [seconds * size / COPIED_BYTES for seconds in copies],
        "hf_to_megatron": to_megatron, "megatron_to_hf": to_hf, "ranks": ranks,
    }  # fmt: skip


def drop_from_cache(file: Path) -> None:
    """Make the next reader of a file wait for the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _copy_part(source: Path, target: Path) -> float:
    """Seconds to copy the last ``COPIED_BYTES`` of a file, which hold no zeros, and sync them to disk."""
    part = target.with_name("part")
    with source.open("rb") as file, part.open("wb") as written:
        file.seek(-COPIED_BYTES, os.SEEK_END)
        shutil.copyfileobj(file, written, 1 << 24)
    drop_from_cache(part)
    seconds = copy_seconds(part, target)
    part.unlink()
    return seconds


def _rank(rank: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.released_size", "--rank", str(rank), "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"rank {rank} failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the JSON, return it. Raises ValueError if the disk has too little room."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.released_size", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write (default: %(default)s)")
    parser.add_argument(
        "--zero-layers", type=int, default=0, metavar="N", help="every N-th layer is zeros, for a smaller disk (default: none)"
    )
    parser.add_argument("--output", type=Path, help="file for the record (default: none)")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rank is not None:
        print(json.dumps(rank_main(args.rank, args.folder)))
        return {}
    needed, free = needed_bytes(args.zero_layers), shutil.disk_usage(args.folder).free
    if free < needed:
        raise ValueError(f"{args.folder} has {free / 1e9:.0f} GB free, and {needed / 1e9:.0f} GB are needed (less with --zero-layers)")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="released_size_") as folder:
        result = measure(Path(folder).resolve(), args.zero_layers)
    report(result, args.output)
    return result


if __name__ == "__main__":
    main()
