# SPDX-License-Identifier: Apache-2.0
"""Runs prompts to answers on disk: load, answer batch by batch, write, and continue an interrupted run."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_bagel.common.writable import check_writable, writing_to
from megatron_bagel.inference.batch.in_order import answer_in_order
from megatron_bagel.inference.batch.prompts import Prompt
from megatron_bagel.inference.batch.requests import Answer
from megatron_bagel.inference.batch.results import AnswerWriter
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.core.guidance import Guidance
from megatron_bagel.inference.core.image_sampling import ImageSampling
from megatron_bagel.inference.core.noise import KeyedNoise
from megatron_bagel.inference.core.sampling import TextSampling


def check_prompts(engine: Engine, prompts: Sequence[Prompt]) -> None:
    """Check that this model can do what the prompts ask before the first answer."""
    for prompt in prompts:
        outputs = prompt.outputs or (prompt.output,)
        if "image" in outputs:
            engine.need_autoencoder()
        if "text" in outputs and engine.vision_tower is None and any(kind == "image" for kind, _ in prompt.terms):
            raise ValueError(f"{prompt.name}: this model has no vision tower (visual_und off), it cannot answer about images")
        if prompt.size is not None:
            engine.latent_grid(*prompt.size)


def run_prompts(args: Namespace, prompts: Sequence[Prompt]) -> int:
    """Answer ``prompts`` with the options of ``args`` (arguments.py) into ``args.out``; return the number of answers.

    Raises ValueError for impossible options or prompts before anything is written.
    """
    # Imports Megatron-Core, so the platform must be installed first.
    from megatron_bagel.inference.batch.replicas import Replicas

    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    text, image = sampling_of(args)
    for prompt in prompts:
        prompt.check_files()
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise ValueError(f"--out {args.out} is a file; give a folder")
    check_writable(args.out, "--out")
    engine = open_engine(args)
    check_prompts(engine, prompts)
    jobs = [_Job.of(prompt, sample, args) for prompt in prompts for sample in range(args.num_samples)]
    replicas, writer = Replicas.launched(), None

    def begin() -> set[str]:
        nonlocal writer
        with writing_to(args.out, "--out"):
            writer = AnswerWriter(args.out, _answer_settings(args), args.resume)
        return {job.name for job in jobs if writer.has(job.name, job.prompt, job.seed)}

    answered_names = replicas.agreed(begin)
    open_jobs = [job for job in jobs if job.name not in answered_names]
    round_size = args.batch_size * replicas.count
    with writer or nullcontext():
        for start in range(0, len(open_jobs), round_size):
            start_time, round_jobs = time.monotonic(), open_jobs[start : start + round_size]
            local_jobs = round_jobs[replicas.number * args.batch_size : (replicas.number + 1) * args.batch_size]
            requests = [job.prompt.request(args.exif) for job in local_jobs]
            noise_of = partial(_noise, local_jobs)
            answers = replicas.collected(answer_in_order(engine, requests, noise_of, text, image))
            if writer is not None:
                seconds = (time.monotonic() - start_time) / len(round_jobs)
                with writing_to(args.out, "--out"):
                    _write(writer, round_jobs, answers, seconds, (len(answered_names) + start, len(jobs)))
    return len(jobs)


def sampling_of(args: Namespace) -> tuple[TextSampling, ImageSampling]:
    """Return how texts and pictures are made. Raises ValueError naming an option out of its range."""
    if args.enable_taylorseer:
        raise ValueError("--enable-taylorseer: the original's TaylorSeer approximation is not offered; lower --num-timesteps instead")
    guidance = Guidance(args.cfg_text_scale, args.cfg_img_scale, tuple(args.cfg_interval), args.cfg_renorm_min, args.cfg_renorm_type)
    image = ImageSampling(args.num_timesteps, args.timestep_shift, guidance, args.cfg_couple_batch, args.capture_steps)
    return TextSampling(args.max_length, args.do_sample, args.temperature, args.top_p, args.static_cache), image


def open_engine(args: Namespace) -> Engine:
    """Load the model of ``--model``."""
    from megatron_bagel.inference.core.capture import launched_because
    from megatron_bagel.inference.core.load_engine import LoadOptions, load_engine

    named = (
        "weights", "dtype", "tokenizer", "autoencoder", "vae_transform", "vit_transform", "max_latent_size", "interpolate_pos",
        "check_weights", "weights_name", "llm_path", "vit_path", "adapter",
    )  # fmt: skip
    ranks = {"tensor_parallel": args.tensor_model_parallel_size, "expert_parallel": args.expert_model_parallel_size}
    options = LoadOptions(**{name: getattr(args, name) for name in named}, **ranks)
    engine = load_engine(args.model, options)
    if (args.static_cache or args.capture_steps) and dist.get_rank() == 0 and (reason := launched_because(engine)) is not None:
        print(f"--static-cache and --capture-steps replay no graphs here: {reason}", flush=True)
    return engine


@dataclass(frozen=True)
class _Job:
    """One answer to make. The prompt's name also keys the noise, so that prompts of one seed start from different pictures."""

    name: str
    prompt: Prompt
    seed: int

    @classmethod
    def of(cls, prompt: Prompt, sample: int, args: Namespace) -> _Job:
        """Return the job of sample number ``sample`` of a prompt; seeds count up."""
        seed = (args.seed if prompt.seed is None else prompt.seed) + sample
        return cls(prompt.name if args.num_samples == 1 else f"{prompt.name}_{sample}", prompt, seed)


def _noise(jobs: Sequence[_Job], row: int, number: int) -> KeyedNoise:
    """Return the noise of item ``number`` of a job's answer; the only item of an answer has that of the prompt."""
    prompt = jobs[row].prompt
    return KeyedNoise(jobs[row].seed, f"{prompt.name}/{number}" if prompt.outputs else prompt.name)


def _answer_settings(args: Namespace) -> dict[str, Any]:
    """Return the options that decide an answer, besides the prompt."""
    of_prompts = {"input", "terms", "prompt", "image", "output", "num_samples", "seed"}
    limits = {"max_text_bytes", "max_json_depth"}
    ranks = {"tensor_model_parallel_size", "expert_model_parallel_size"}
    # A captured step is the launched one, replayed.
    free = of_prompts | limits | ranks | {"capture_steps", "out", "resume", "batch_size", "serve", "host", "port"}
    return {name: value for name, value in vars(args).items() if name not in free}


def _write(writer: AnswerWriter, jobs: Sequence[_Job], answers: Sequence[Answer], seconds: float, progress: tuple[int, int]) -> None:
    """Write a round's answers and print them; ``progress`` is (earlier answers, all answers), ``seconds`` the time per answer."""
    for row, (job, result) in enumerate(zip(jobs, answers, strict=True)):
        record = writer.write(job.name, job.prompt, job.seed, result)
        items = [str(item.get("image", item.get("text"))) for item in record.get("items", ())]
        text = " ".join([str(record[key]) for key in ("thought", "text") if key in record] + items)
        description = f"{writer.folder / record['image']} {text}".strip() if "image" in record else text
        print(f"[{progress[0] + row + 1}/{progress[1]}] {job.name} ({seconds:.1f} s): {description}", flush=True)
