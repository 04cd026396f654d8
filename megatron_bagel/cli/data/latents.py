# SPDX-License-Identifier: Apache-2.0
"""Store the autoencoder's posterior of every image of the generation groups, so that training with --latent_cache needs no VAE.

    %(prog)s INDEX --dataset_config_file data.yaml --vae hf/BAGEL-7B-MoT/ae.safetensors --output latents
    python -m megatron_bagel.train --latent_cache latents --index_dir INDEX --dataset_config_file data.yaml ...

The cache belongs to this index, these image_transform_args and these weights. The same command continues an interrupted one. With
--num-jobs N each job (one per GPU, say) writes its share to a shared file system, and the last one to end completes the cache. --engine
slurm-array takes the numbers from Slurm; --engine ray has an actor for each GPU of a Ray cluster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from tqdm import tqdm

from megatron_bagel import platform
from megatron_bagel.cli.data.engine import add_engine_flags, chosen_engine
from megatron_bagel.cli.hub_models import needs_autoencoder, with_local_folders
from megatron_bagel.cli.usage import command_parser, report_error
from megatron_bagel.common.paths import path_flag
from megatron_bagel.common.writable import check_writable, writing_to
from megatron_bagel.data.index.latent_cache import DTYPES
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.sources.dataset_config import load_groups
from megatron_bagel.encoders.autoencoder_io import load_autoencoder
from megatron_bagel.encoders.latent_ray import LatentJob, encode_in_ray
from megatron_bagel.encoders.latent_writer import CacheOptions, clear_latent_cache, total_images, write_latent_cache


def parse_arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Return the command line's values."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("index", type=path_flag, help="folder of an index")
    parser.add_argument("--dataset_config_file", "--dataset-config-file", required=True, type=path_flag, metavar="YAML",
                        help="the dataset YAML that training reads too: its image_transform_args are applied")  # fmt: skip
    parser.add_argument(
        "--vae",
        "--vae_path",
        "--vae-path",
        required=True,
        type=path_flag,
        metavar="FILE",
        help="file of the autoencoder's weights, or owner/name on a hub",
    )
    parser.add_argument("--output", required=True, type=path_flag, metavar="DIR", help="folder of the cache")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="float32 (default) keeps the losses of encoding; "
                        "bfloat16 halves the size and rounds")  # fmt: skip
    add_engine_flags(parser)
    parser.add_argument("--workers", type=int, default=0, help="actors of a Ray without GPUs (default: one per core)")
    parser.add_argument("--overwrite", action="store_true", help="replace another cache at --output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str = "megatron-bagel data latents") -> int:
    """Fill the cache, or one job's part of it. Returns the exit status."""
    args = parse_arguments(argv, prog)
    platform.install()  # on a CPU this keeps the memory of the encoder's temporaries: returning it took as long as encoding
    try:
        engine = chosen_engine(args)
        if args.workers and engine.cluster is None:
            raise ValueError("--workers needs --engine ray; without it, start several jobs with --num-jobs")
        options = CacheOptions(args.dtype, platform.device(), engine.num_jobs, engine.job_index)
        check_writable(args.output, "--output")
        args, _ = with_local_folders(args, {"vae": needs_autoencoder("--vae")})
        groups = [group for group in load_groups(args.dataset_config_file) if group.makes_images]
        index = IndexedSamples.open(args.index)
        if not groups:
            raise ValueError(f"{args.dataset_config_file} has no group that generates images, so there is nothing to cache")
        if args.overwrite:
            clear_latent_cache(args.output)
        autoencoder = load_autoencoder(args.vae, flag="--vae").to(options.device)
        images = total_images(index.manifest, groups) // engine.num_jobs
        interval = 0.1 if sys.stderr.isatty() else 30.0
        with writing_to(args.output, "--output"), tqdm(total=images, unit="image", desc="latents", mininterval=interval) as progress_bar:
            job = LatentJob(args.index, args.vae, args.output, args.dtype)
            in_ray = None if engine.cluster is None else partial(encode_in_ray, job, engine.cluster)
            complete = write_latent_cache(index, groups, args.vae, autoencoder, args.output, options, progress_bar.update, in_ray)
    except (ValueError, OSError) as error:
        report_error(prog, error)
        return 2
    print(f"{args.output}: " + ("complete" if complete else f"job {engine.job_index} of {engine.num_jobs} is done, others are not"))
    return 0
