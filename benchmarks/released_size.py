# SPDX-License-Identifier: Apache-2.0
"""A folder with the names and shapes of the released model, 29 GB of bf16: into a checkpoint and back, bit for bit, as JSON.

    python -m benchmarks.released_size --folder DISK --output benchmarks/results/released-size.json

Reported are peak memory and seconds of both directions, and the bytes that a rank of tensor 4 x pipeline 2 reads of the folder beside its
share of the weights. Beside each direction stands what plain copies take: one of its whole input right before it (``whole_copy_s``), and,
right before and right after it, one of 4 GB from the middle of the file, scaled to its size (``copy_s``). 4 GB fit into memory, so such a
copy never waits for room there. Copies read from the disk, as the converters do: the page cache is emptied of the file first. The disk
needs room for two such folders. ``--zero-layers K/N`` makes K of every N layers zeros, which an input holds without room, where the disk is
smaller; they are written in full. All files are removed in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint import _module, run_measured
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


@dataclass(frozen=True)
class ZeroLayers:
    """``count`` of every ``of`` layers of the decoder."""

    count: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> ZeroLayers:
        """Read "2/3", or "3" for one of three. This is an argparse type."""
        count, _, of = text.partition("/") if "/" in text else ("1", "", text)
        if not (count.isdigit() and of.isdigit() and 0 < int(count) < int(of)):
            raise argparse.ArgumentTypeError(f"{text!r} is no share of the layers; write 2/3 for two of every three")
        return cls(int(count), int(of))

    def __contains__(self, layer: int) -> bool:
        return layer % self.of < self.count

    def __str__(self) -> str:
        return f"{self.count}/{self.of}" if self.count else "none"


class Values:
    """The bits of every weight, a function of its name: random, or zeros in some layers."""

    def __init__(self, zero_layers: ZeroLayers) -> None:
        self._zero_layers = zero_layers
        self._noise = torch.randn(_PERIOD, generator=torch.Generator().manual_seed(1)).bfloat16()

    def of(self, entry: Entry) -> torch.Tensor:
        """The full tensor of one of our parameters."""
        parts = entry.name.split(".")
        if parts[:2] == ["decoder", "layers"] and int(parts[2]) in self._zero_layers:
            return torch.zeros(entry.shape, dtype=torch.bfloat16)
        size, start = torch.Size(entry.shape).numel(), zlib.crc32(entry.name.encode()) % _PERIOD
        return self._noise.repeat(-(-(size + start) // _PERIOD))[start : start + size].view(entry.shape)


def needed_bytes(zero_layers: ZeroLayers) -> float:
    """The room that both folders need, and what stays free for others."""
    from megatron_bagel.checkpoint.hf.folder import WeightFile

    weight_map = WeightMap(released_arch())
    whole = WeightFile(torch.zeros, "bf16").bytes(weight_map)
    layer = sum(2 * torch.Size(entry.shape).numel() for name, entry in weight_map.entries.items() if name.startswith("decoder.layers.0."))
    zeros = layer * sum(number in zero_layers for number in range(28))
    return 2 * whole - zeros + SPARE_BYTES


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


def measure(folder: Path, zero_layers: ZeroLayers) -> dict[str, Any]:
    """Both directions, and what ranks read. The input's weights are removed before the way back."""
    source, values = folder / "hf", Values(zero_layers)
    write_input(source, values)
    weights = source / "ema.safetensors"
    size = weights.stat().st_size
    _give_back_zeros(weights, zero_layers)
    start = run_measured("from megatron_bagel import platform; platform.install(); import megatron_bagel.checkpoint.convert")
    whole_copies = [copy_seconds(weights, folder / "copied", size)]
    copies = [copy_seconds(weights, folder / "copied")]
    drop_from_cache(weights)
    to_megatron = run_measured(_module("tools.checkpoint_convert.hf_to_megatron"), _words(model=source, output=folder / "checkpoint"))
    weights.unlink()
    stored = next((folder / "checkpoint").rglob("*.distcp"))
    _give_back_zeros(stored, zero_layers)
    copies.append(copy_seconds(stored, folder / "copied"))
    _tell("in", to_megatron, copies[:2], whole_copies[0])
    whole_copies.append(copy_seconds(stored, folder / "copied", stored.stat().st_size))
    drop_from_cache(stored)
    to_hf = run_measured(
        _module("tools.checkpoint_convert.megatron_to_hf"), _words(checkpoint=folder / "checkpoint", output=folder / "back")
    )
    stored.unlink()
    copies.append(copy_seconds(folder / "back/ema.safetensors", folder / "copied"))
    _tell("out", to_hf, copies[1:], whole_copies[1])
    is_equal = equal(folder / "back/ema.safetensors", values)
    print(f"equal after both: {is_equal}", file=sys.stderr, flush=True)
    drop_from_cache(folder / "back/ema.safetensors")
    ranks = [_rank(rank, folder / "back") for rank in (0, TENSOR * PIPELINE - 1)]
    return {
        "weight_bytes": size, "zero_layers": str(zero_layers), "equal_after_both": is_equal, "start_s": start["wall_s"],
        "start_peak_bytes": start["peak_bytes"], "hf_to_megatron": to_megatron | {"copy_s": copies[:2], "whole_copy_s": whole_copies[0]},
        "megatron_to_hf": to_hf | {"copy_s": copies[1:], "whole_copy_s": whole_copies[1]}, "ranks": ranks,
    }  # fmt: skip


def _words(**flags: Path) -> list[str]:
    return [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]


def _tell(way: str, measured: dict[str, float], copies: list[float], whole_copy: float) -> None:
    """Print a direction beside its copies as soon as it is known."""
    before, after = copies
    peak = measured["peak_bytes"] / 1e9
    took = f"{way}: {measured['wall_s']:.0f} s, {measured['cpu_s']:.0f} s of processor, at most {peak:.3f} GB of memory"
    copied = f"a plain copy of the same bytes: {whole_copy:.0f} s; by 4 GB: {before:.0f} s before, {after:.0f} s after"
    print(f"{took}; {copied}", file=sys.stderr, flush=True)


def _give_back_zeros(file: Path, zero_layers: ZeroLayers) -> None:
    """Give the room of zeros in a file back to the disk."""
    if zero_layers.count:
        subprocess.run(["fallocate", "--dig-holes", str(file)], check=True)


def drop_from_cache(file: Path) -> None:
    """Make the next reader of a file wait for the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(file: Path, target: Path, num_bytes: int = COPIED_BYTES) -> float:
    """Seconds that a copy of a file takes that ends on the disk, by the copy of ``num_bytes`` from its middle."""
    os.sync()  # nothing of what was written before waits any more
    drop_from_cache(file)
    size = file.stat().st_size
    start, copied = time.perf_counter(), 0
    with file.open("rb") as read, target.open("wb") as written:
        first = (size - num_bytes) // 2
        while copied < num_bytes:
            copied += os.sendfile(written.fileno(), read.fileno(), first + copied, min(1 << 26, num_bytes - copied))
        os.fsync(written.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds * size / num_bytes


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
        "--zero-layers",
        type=ZeroLayers.parse,
        default=ZeroLayers(),
        metavar="K/N",
        help="K of every N layers are zeros, for a smaller disk (default: %(default)s)",
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
