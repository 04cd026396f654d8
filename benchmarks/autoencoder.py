# SPDX-License-Identifier: Apache-2.0
"""Seconds of encoding images with the autoencoder: one at a time, in batches of one size, and with each ``--vae_kernels``.

    python -m benchmarks.autoencoder                              # FLUX's autoencoder on 26 images of 4 sizes
    python -m benchmarks.autoencoder --width 32 --side 64 --compile --compile-sizes

``largest_difference`` compares means of the posteriors with the plain kernels, one image at a time, relative to the largest mean. With
``--compile`` there is ``--vae_kernels compiled`` too, which is compiled for all sizes together; with ``--compile-sizes`` each of the other
variants is also compiled for each of its sizes, which takes minutes at FLUX's width. The first call, which compiles, is timed apart. With
``--output`` the record is written after each variant, so that a run which is stopped leaves what it measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

import torch
from torch import Tensor

from megatron_bagel import platform

platform.install()

from benchmarks.record import report, write_record  # noqa: E402
from megatron_bagel.config.architecture import AutoencoderArch  # noqa: E402
from megatron_bagel.encoders.autoencoder import AutoEncoder  # noqa: E402
from megatron_bagel.platform.device import device_name, peak_memory_bytes, synchronize  # noqa: E402

#: Name -> kernels, and whether images of one size share a call.
VARIANTS = {
    "plain, one at a time": ("plain", False),
    "plain, batched": ("plain", True),
    "split_norm, one at a time": ("split_norm", False),
    "split_norm, batched": ("split_norm", True),
    "channels_last, one at a time": ("channels_last", False),
    "channels_last, batched": ("channels_last", True),
}

#: The same for kernels that are compiled for all sizes together.
COMPILED = {"compiled, one at a time": ("compiled", False), "compiled, batched": ("compiled", True)}


def images(count: int, side: int) -> list[Tensor]:
    """Random images of four sizes between ``side`` and half of it, in turn."""
    generator = torch.Generator().manual_seed(0)
    half = max(16, side // 2 // 16 * 16)
    sizes = [(side, side), (half, side), (side, half), (half, half)]
    return [(torch.rand(3, *sizes[number % 4], generator=generator) * 2 - 1).to(platform.device()) for number in range(count)]


def seconds_of(work: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Seconds of the first call, and the median of the ``rounds`` after it."""
    taken = []
    for _ in range(rounds + 1):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        taken.append(time.perf_counter() - start)
    return taken[0], statistics.median(taken[1:])


@torch.no_grad()
def measure(
    model: AutoEncoder, pictures: Sequence[Tensor], arguments: argparse.Namespace, write: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Every variant: its seconds, and how far its means are from those of the first. ``write`` gets all of them after each."""
    results: dict[str, Any] = {}
    expected: list[Tensor] = []
    encoder = model.encoder
    for name, (kernels, batched) in (VARIANTS | (COMPILED if arguments.compile else {})).items():
        for compiles in (False, True) if arguments.compile_sizes and name not in COMPILED else (False,):
            torch.compiler.reset()  # torch keeps few versions of a function, and those of another variant would count
            model.use_kernels(kernels, arguments.batch_pixels if batched else 1)
            model.encoder = torch.compile(encoder, dynamic=False) if compiles else encoder
            means: list[Tensor] = []

            def encode(means: list[Tensor] = means) -> None:
                means[:] = [mean for mean, _ in model.encode_many(pictures)]

            with torch.autocast(platform.device().type, torch.bfloat16, enabled=arguments.bf16):
                first, median = seconds_of(encode, arguments.rounds)
            model.encoder = encoder
            expected = expected or [mean.float() for mean in means]
            largest = max(float(mean.abs().max()) for mean in expected)
            difference = max(float((one.float() - two).abs().max()) for one, two in zip(means, expected, strict=True)) / largest
            figures = {"first_s": first, "seconds": median, "largest_difference": difference}
            results[f"{name}, compiled" if compiles else name] = figures
            figures["times_as_fast"] = results["plain, one at a time"]["seconds"] / median
            write(results)
    return results


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128, help="channels at full resolution, a multiple of 32 (FLUX's: 128)")
    parser.add_argument("--images", type=int, default=26, help="number of images (default 26)")
    parser.add_argument("--side", type=int, default=512, help="larger side of the images in pixels, a multiple of 16 (default 512)")
    parser.add_argument("--batch-pixels", type=int, default=1 << 20, help="--vae_batch_pixels of the batched variants")
    parser.add_argument("--rounds", type=int, default=3, help="measured repetitions; medians are reported")
    parser.add_argument("--bf16", action="store_true", help="under bf16 autocast")
    parser.add_argument("--compile", action="store_true", help="also --vae_kernels compiled")
    parser.add_argument("--compile-sizes", action="store_true", help="also each of the other variants compiled for each of its sizes")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch; 0 keeps torch's choice")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    arguments = parser.parse_args(argv)
    if arguments.width % 32 or arguments.side % 16 or min(arguments.images, arguments.rounds, arguments.width, arguments.side) < 1:
        parser.error("--width must be a multiple of 32, --side one of 16, and --images and --rounds at least 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON object, and return it."""
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # Otherwise torch would run the encoder eagerly once it had been compiled too often, and the figures would not be the compiled one's.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.manual_seed(0)
    model = AutoEncoder(AutoencoderArch(ch=arguments.width)).to(platform.device()).eval().requires_grad_(False)
    pictures = images(arguments.images, arguments.side)
    result: dict[str, Any] = {
        "device": device_name(), "width": arguments.width, "images": arguments.images, "side": arguments.side, "bf16": arguments.bf16,
        "threads": torch.get_num_threads(), "variants": {},
    }  # fmt: skip

    def write(variants: dict[str, Any]) -> None:
        result.update(peak_mem_bytes=peak_memory_bytes(), variants=variants)
        if arguments.output:
            write_record(arguments.output, result)

    measure(model, pictures, arguments, write)
    report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
