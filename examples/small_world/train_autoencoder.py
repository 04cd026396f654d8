# SPDX-License-Identifier: Apache-2.0
"""Makes the autoencoder in megatron_bagel/sample_world/assets/vae: FLUX's architecture at a width of 64, trained on the sample world alone.

    OMP_NUM_THREADS=2 python examples/small_world/train_autoencoder.py OUT
    OMP_NUM_THREADS=2 python examples/small_world/train_autoencoder.py OUT2 --start OUT/ae.safetensors --steps 0 0 1200 --lr 0.001

It grows from pictures of 16 pixels to 32 and 64 (see megatron_bagel/sample_world/autoencoder_growing.py). Judged not by decibels but by
whether the scorer still reads colour, place and kind of the shape off the reconstruction.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.data.keyed_random import keyed_generator
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.autoencoder_io import load_autoencoder, save_autoencoder
from megatron_bagel.sample_world.autoencoder_growing import grow, optimizers_of, seed_autoencoder
from megatron_bagel.sample_world.autoencoder_training import Progress, TrainerSettings, fit_latent_scale, psnr, train_autoencoder
from megatron_bagel.sample_world.score import read_single
from megatron_bagel.sample_world.world import SIZES, Scene, World, draw_scene, render

ARCH = AutoencoderArch(ch=64, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=16, resolution=64)
FIRST_WORLD = World()
# A third of the pictures show several shapes of both sizes, so that the codec is not tied to one shape in a known place.
CROWDED_WORLD = World(max_count=6, sizes=tuple(SIZES))
POOL = 3000
BATCH = (16, 12, 4)


def pictures(scenes: list[Scene]) -> torch.Tensor:
    """Renders [n, 3, 64, 64] in [-1, 1]."""
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1


def training_pictures(seed: int) -> torch.Tensor:
    """The pool that batches are drawn from."""
    worlds = [CROWDED_WORLD if i % 3 == 0 else FIRST_WORLD for i in range(POOL)]
    return pictures([draw_scene(world, keyed_generator(seed, "autoencoder", i)) for i, world in enumerate(worlds)])


def batches(pool: torch.Tensor, size: int, shrink: int, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """Endless random batches [size, 3, 64 / shrink, 64 / shrink]."""
    while True:
        chosen = pool[torch.from_numpy(rng.integers(len(pool), size=size))]
        yield F.avg_pool2d(chosen, shrink) if shrink > 1 else chosen


@torch.no_grad()
def judge(model: AutoEncoder, count: int = 200) -> dict[str, float]:
    """PSNR in dB, and the share of new pictures of which the scorer reads each attribute right after encoding and decoding."""
    scenes = [draw_scene(FIRST_WORLD, keyed_generator(-1, "judge", i)) for i in range(count)]
    images = pictures(scenes)
    mean, logvar = model.encode_moments(images)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    output = model.decode(model.sample(mean, logvar, noise)).clamp(-1, 1)
    seen = ((output * 0.5 + 0.5) * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    found = [read_single(picture).shape for picture in seen]
    shares = {"psnr": psnr(output, images)}
    for attribute in ("colour", "position", "shape"):
        right = [f is not None and getattr(f, attribute) == getattr(s.shapes[0], attribute) for f, s in zip(found, scenes, strict=True)]
        shares[attribute] = float(np.mean(right))
    shares["all"] = float(np.mean([f == s.shapes[0] for f, s in zip(found, scenes, strict=True)]))
    return shares


def told(shares: dict[str, float]) -> str:
    """One line of `judge`'s numbers."""
    return f"{shares['psnr']:.1f} dB; read right: " + ", ".join(f"{k} {v:.1%}" for k, v in shares.items() if k != "psnr")


def train(steps: list[int], lr: float, seed: int, start: Path | None) -> AutoEncoder:
    """All stages, or with `start` only the last one from those weights; prints progress."""
    pool, rng = training_pictures(seed), keyed_generator(seed, "batches")
    generator = torch.Generator().manual_seed(seed)
    model = load_autoencoder(start, flag="--start") if start else seed_autoencoder(ARCH, generator)
    for stage, (count, batch) in enumerate(zip(steps, BATCH, strict=True)):
        if start and stage < len(BATCH) - 1:
            continue
        if stage and not start:
            model = grow(model, generator)
        shrink = 4 >> stage

        def report(progress: Progress, side: int = 64 // shrink) -> None:
            print(f"{side:3d} pixels, step {progress.step:5d}: loss {progress.loss:.4f}, {progress.psnr:.1f} dB", flush=True)

        model.requires_grad_(True)
        settings = TrainerSettings(steps=count, lr=lr, warmup=20, seed=seed)
        train_autoencoder(model, batches(pool, batch, shrink, rng), settings, report, optimizers=optimizers_of(model, lr))
    fit_latent_scale(model, pool[:256])
    return model


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for ae.safetensors (fp16) and ae_config.json")
    parser.add_argument("--steps", type=int, nargs=3, default=[250, 300, 1000], metavar="N", help="per stage (default 250 300 1000)")
    parser.add_argument("--start", type=Path, metavar="FILE", help="weights that an earlier run wrote, to train on in the last stage")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default 0.002)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, pictures and batches (default 0)")
    args = parser.parse_args(argv)
    path = args.out / "ae.safetensors"
    save_autoencoder(train(args.steps, args.lr, args.seed, args.start), path, torch.float16)
    print(f"{path}, {path.stat().st_size / 1e6:.2f} MB: {told(judge(load_autoencoder(path)))}")


if __name__ == "__main__":
    main()
