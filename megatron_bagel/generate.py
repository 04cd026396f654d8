"""Pictures from prompts, edited pictures, answers about pictures: ``python -m megatron_bagel.generate --help``."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron_bagel import platform
from megatron_bagel.inference.arguments import parse_arguments, parse_size
from megatron_bagel.inference.engine import Engine
from megatron_bagel.inference.guidance import Guidance
from megatron_bagel.inference.image import ImageSampling
from megatron_bagel.inference.noise import KeyedNoise
from megatron_bagel.inference.prompt_files import AnswerWriter, Prompt, make_prompt, read_prompts
from megatron_bagel.inference.requests import answer
from megatron_bagel.inference.sampling import TextSampling
from megatron_bagel.platform.distributed import shutdown_distributed


def collect_prompts(args: Namespace) -> list[Prompt]:
    """Prompts of the command line or of ``--input``; ValueError for none, or for both."""
    size = parse_size(args.image_size) if args.image_size else None
    common = {"think": args.think, "system_prompt": args.system_prompt, "size": size}
    terms: list[tuple[str, str]] = getattr(args, "terms", None) or []
    if args.system_prompt and not args.think:
        raise ValueError("--system-prompt replaces the prompt of --think; pass --think as well")
    if args.input:
        if terms:
            raise ValueError("give either --input or --prompt and --image, not both")
        return read_prompts(args.input, args.task, common)
    if args.task == "interleave":
        return [make_prompt("00000", "interleave", (), (), terms, args.output, **common)]
    texts, images = ([value for kind, value in terms if kind == wanted] for wanted in ("text", "image"))
    if not texts:
        raise ValueError("there is nothing to do: give --prompt TEXT or --input FILE")
    return [make_prompt(f"{i:05d}", args.task, [text], images, (), args.output, **common) for i, text in enumerate(texts)]


def check_prompts(engine: Engine, prompts: Sequence[Prompt]) -> None:
    """Refuse what this model cannot do before the first answer is begun."""
    for prompt in prompts:
        if prompt.output == "image":
            engine.need_autoencoder()
        if prompt.output == "text" and engine.vision_tower is None and any(kind == "image" for kind, _ in prompt.terms):
            raise ValueError(f"{prompt.name}: this model has no vision tower (visual_und off), it cannot answer about images")
        if prompt.size is not None:
            engine.latent_grid(*prompt.size)


def run(args: Namespace) -> int:
    """Load, answer batch by batch, write; returns how many answers were written."""
    # Imports Megatron-Core, which must find the platform installed.
    from megatron_bagel.inference.loading import LoadOptions, load_engine

    if args.enable_taylorseer:
        raise ValueError("--enable-taylorseer: the original's TaylorSeer approximation is not offered; lower --num-timesteps instead")
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    guidance = Guidance(args.cfg_text_scale, args.cfg_img_scale, tuple(args.cfg_interval), args.cfg_renorm_min, args.cfg_renorm_type)
    image = ImageSampling(args.num_timesteps, args.timestep_shift, guidance, args.cfg_couple_batch)
    text = TextSampling(args.max_length, args.do_sample, args.temperature, args.top_p)
    prompts = collect_prompts(args)
    for prompt in prompts:
        prompt.check_files()
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise ValueError(f"--out {args.out} is a file; give a folder")
    named = ("weights", "dtype", "tokenizer", "autoencoder", "vae_transform", "vit_transform", "max_latent_size", "interpolate_pos")
    engine = load_engine(args.model, LoadOptions(**{name: getattr(args, name) for name in named}))
    check_prompts(engine, prompts)
    jobs = [(prompt, sample) for prompt in prompts for sample in range(args.num_samples)]
    with AnswerWriter(args.out) as writer:
        for start in range(0, len(jobs), args.batch_size):
            _answer_batch(engine, jobs[start : start + args.batch_size], (start, len(jobs)), args, (text, image), writer)
    return len(jobs)


def _answer_batch(
    engine: Engine,
    jobs: Sequence[tuple[Prompt, int]],
    place: tuple[int, int],
    args: Namespace,
    sampling: tuple[TextSampling, ImageSampling],
    writer: AnswerWriter,
) -> None:
    """Answer (prompt, sample number) pairs together; ``place`` is (answers before these, all answers), for the progress line."""
    started = time.monotonic()
    seeds = [(args.seed if prompt.seed is None else prompt.seed) + sample for prompt, sample in jobs]
    # The name keys the noise too: prompts of one seed must not all start from the same picture.
    noise = [KeyedNoise(seed, prompt.name) for seed, (prompt, _) in zip(seeds, jobs, strict=True)]
    answers = answer(engine, [prompt.request() for prompt, _ in jobs], noise, *sampling)
    seconds = (time.monotonic() - started) / len(jobs)
    for row, ((prompt, sample), seed, result) in enumerate(zip(jobs, seeds, answers, strict=True)):
        name = prompt.name if args.num_samples == 1 else f"{prompt.name}_{sample}"
        record = writer.write(name, prompt, seed, result)
        said = " ".join(str(record[key]) for key in ("thought", "text") if key in record)
        shown = f"{writer.folder / record['image']} {said}".strip() if "image" in record else said
        print(f"[{place[0] + row + 1}/{place[1]}] {name} ({seconds:.1f} s): {shown}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; mistakes of the user end with one sentence and status 2."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    platform.install()
    try:
        count = run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        shutdown_distributed()
    print(f"{count} answers in {args.out}/results.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
