# SPDX-License-Identifier: Apache-2.0
"""Speed of generation as JSON: tokens per second and seconds per picture, with the cache and reading everything anew each time.

    python -m benchmarks.generate                                         # a named model with random weights
    python -m benchmarks.generate --model DIR --side 512 --steps 50       # a trained one
    python -m benchmarks.generate --batch 8                               # several prompts at once

Random weights are fp32 on a CPU and bf16 on a GPU. Run it on an otherwise idle machine. ``largest_difference`` compares logits and
pictures with those of the cached way: it is rounding alone. On a GPU ``text_static`` and ``picture_captured`` replay graphs, whose
capture is part of their time; ``launched_because`` says why they do not. Process seconds (all threads of this process) are given beside
the clock's, for machines that do other things too. With ``--output`` the record is written after each way.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_bagel import platform

platform.install()

from benchmarks.named_configs import CONFIGS, SEED, megatron_config  # noqa: E402
from benchmarks.record import report, write_record  # noqa: E402
from megatron_bagel.data.tokenizer import load_tokenizer  # noqa: E402
from megatron_bagel.encoders.autoencoder import AutoEncoder  # noqa: E402
from megatron_bagel.encoders.vision_tower import VisionTower  # noqa: E402
from megatron_bagel.inference.batch.requests import Conversation, Request, read_terms  # noqa: E402
from megatron_bagel.inference.core.capture import launched_because  # noqa: E402
from megatron_bagel.inference.core.context import Context  # noqa: E402
from megatron_bagel.inference.core.engine import Engine  # noqa: E402
from megatron_bagel.inference.core.guidance import Guidance, time_grid  # noqa: E402
from megatron_bagel.inference.core.image import generate_latents  # noqa: E402
from megatron_bagel.inference.core.image_sampling import ImageSampling  # noqa: E402
from megatron_bagel.inference.core.load_engine import LoadOptions, image_transforms, load_engine  # noqa: E402
from megatron_bagel.inference.core.noise import KeyedNoise  # noqa: E402
from megatron_bagel.inference.core.token_loop import StaticLoop  # noqa: E402
from megatron_bagel.model.build import build_decoder  # noqa: E402
from megatron_bagel.platform.device import device_name, synchronize  # noqa: E402
from megatron_bagel.platform.launch.process_group import init_distributed, shutdown_distributed  # noqa: E402
from megatron_bagel.sample_world.tokenizer_training import train_tokenizer  # noqa: E402

PROMPT = "a large picture of a red circle in the top left on a white background"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=sorted(CONFIGS), default="bench-53m", help="of the random model (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="a trained model instead: Hugging Face folder or checkpoint")
    parser.add_argument("--tokens", type=int, default=64, help="length of the text (default: %(default)s)")
    parser.add_argument("--side", type=int, default=256, help="pixels per side of pictures, drawn and given (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="Euler steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="prompts at once (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch; 0 keeps torch's choice")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    arguments = parser.parse_args(argv)
    if min(arguments.tokens, arguments.side, arguments.steps, arguments.batch) < 1:
        parser.error("--tokens, --side, --steps and --batch must be at least 1")
    return arguments


def random_engine(name: str, folder: Path) -> Engine:
    """A named model with random weights and a tokenizer trained on one sentence."""
    arch = CONFIGS[name].arch
    # Room for every byte and the special tokens.
    arch = replace(arch, llm=replace(arch.llm, vocab_size=max(arch.llm.vocab_size, 320)))
    train_tokenizer([PROMPT] * 4, folder, 312)
    dtype = torch.bfloat16 if platform.has_gpu() else torch.float32
    decoder = build_decoder(arch, megatron_config(arch, bf16=platform.has_gpu()))
    torch.nn.init.normal_(decoder.llm2vae.weight, std=0.02)
    tower = VisionTower(arch)
    tower.reset_parameters(torch.Generator().manual_seed(SEED))
    autoencoder = AutoEncoder(arch.autoencoder).to(platform.device())
    parts = [decoder.to(platform.device(), dtype), tower.to(platform.device(), dtype), autoencoder]
    parts = [part.eval().requires_grad_(False) for part in parts]
    return Engine(*parts, load_tokenizer(folder), arch, *image_transforms(arch, None, None))


def conversations(engine: Engine, arguments: argparse.Namespace) -> list[Conversation]:
    """What the model is asked: to change a picture, which has all three views and the longest context."""
    pixels = np.random.default_rng(0).integers(0, 256, (arguments.side, arguments.side, 3), dtype=np.uint8)
    request = Request((Image.fromarray(pixels), PROMPT), size=(arguments.side, arguments.side))
    return [Conversation(request, KeyedNoise(0, number)) for number in range(arguments.batch)]


def read(engine: Engine, arguments: argparse.Namespace) -> list[Conversation]:
    """Conversations with everything read."""
    made = conversations(engine, arguments)
    read_terms(engine, made)
    return made


def text_cached(engine: Engine, arguments: argparse.Namespace) -> Tensor:
    """Logits [batch, V] after ``tokens`` tokens written one by one."""
    contexts = [made.views.main for made in read(engine, arguments)]
    tokens = [engine.tokenizer.bos] * len(contexts)
    for _ in range(arguments.tokens):
        logits, contexts = engine.next_logits(contexts, tokens)
        tokens = logits[:, : len(engine.tokenizer)].argmax(-1).tolist()
    return logits


def text_static(engine: Engine, arguments: argparse.Namespace) -> Tensor:
    """The same logits with tensors of fixed shapes, on a GPU by a captured graph."""
    contexts = [made.views.main for made in read(engine, arguments)]
    loop, rows, tokens = StaticLoop(engine, contexts, arguments.tokens), list(range(len(contexts))), [engine.tokenizer.bos] * len(contexts)
    for _ in range(arguments.tokens):
        logits = loop.logits(rows, tokens)
        tokens = logits[:, : len(engine.tokenizer)].argmax(-1).tolist()
    return logits


def text_anew(engine: Engine, arguments: argparse.Namespace) -> Tensor:
    """The same, the whole conversation read for every token."""
    written = [[engine.tokenizer.bos] for _ in range(arguments.batch)]
    for _ in range(arguments.tokens):
        contexts: list[Context] = [made.views.main for made in read(engine, arguments)]
        logits = torch.stack([rows[-1] for rows in engine.logits_of(contexts, written)])
        for ids, token in zip(written, logits[:, : len(engine.tokenizer)].argmax(-1).tolist(), strict=True):
            ids.append(token)
    return logits


def picture(engine: Engine, arguments: argparse.Namespace, anew: bool = False, capture: bool = False) -> Tensor:
    """Latent tokens of all pictures; ``anew`` reads the conversation again for every step, ``capture`` replays the steps on a GPU."""
    grid = engine.latent_grid(arguments.side, arguments.side)
    shape = (grid[0] * grid[1], engine.arch.latent_token_dim)
    made = read(engine, arguments)
    noise = [each.noise.initial(shape) for each in made]
    sampling = ImageSampling(arguments.steps + 1, 3.0, Guidance(4.0, 2.0, (0.0, 1.0), renorm_min=1.0), capture=capture)
    grids = [grid] * len(made)
    if not anew:
        return torch.cat(generate_latents(engine, [each.views for each in made], grids, noise, sampling))
    x = [start.to(engine.device) for start in noise]
    times = time_grid(sampling.num_timesteps, sampling.timestep_shift, engine.device)
    for step, (t, dt) in enumerate(zip(times[:-1].tolist(), (times[:-1] - times[1:]).tolist(), strict=True)):
        views = [each.views for each in (read(engine, arguments) if step else made)]
        pictures = [engine.embed_latents(part, t, engine.latent_position_ids(*grid)) for part in x]
        flat = [context for view in ("main", "without_text", "without_images") for context in (getattr(v, view) for v in views)]
        v = engine.velocities(flat, pictures * 3)
        for number in range(len(x)):
            main, without_text, without_images = v[number :: len(x)]
            guided = without_text + 4.0 * (main - without_text)
            x[number] = x[number] - dt * (without_images + 2.0 * (guided - without_images))
    return torch.cat(x)


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
    """What ``work`` returns, the clock's seconds, and the process's."""
    synchronize()
    clock, process = time.perf_counter(), time.process_time()
    result = work()
    synchronize()
    return result, time.perf_counter() - clock, time.process_time() - process


#: The ways of text and pictures, the slowest last. ``largest_difference`` names them without the medium where they read anew.
TEXTS: dict[str, Callable[[Engine, argparse.Namespace], Tensor]] = {"cached": text_cached, "static": text_static, "anew": text_anew}
PICTURES: dict[str, Callable[[Engine, argparse.Namespace], Tensor]] = {
    "cached": picture,
    "captured": lambda engine, arguments: picture(engine, arguments, capture=True),
    "anew": lambda engine, arguments: picture(engine, arguments, anew=True),
}


@torch.no_grad()
def measure(engine: Engine, arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Measure the ways of text and picture into ``result``, and write the record after each; one token and one step warm up."""
    warm = argparse.Namespace(**{**vars(arguments), "tokens": 1, "steps": 1})
    text_cached(engine, warm), text_static(engine, warm), picture(engine, warm)
    result |= {"context_tokens": read(engine, arguments)[0].views.main.length, "launched_because": launched_because(engine)}
    differences = result["largest_difference"] = {}
    first: dict[str, Tensor] = {}
    ways = [("text", way, work) for way, work in TEXTS.items()] + [("picture", way, work) for way, work in PICTURES.items()]
    for medium, way, work in sorted(ways, key=lambda each: each[1] == "anew"):
        answer, clock, process = timed(lambda work=work: work(engine, arguments))
        if medium == "text":
            written = arguments.tokens * arguments.batch
            result[f"text_{way}"] = {"tokens_per_s": written / clock, "process_seconds_per_token": process / written}
        else:
            result[f"picture_{way}"] = {"seconds": clock / arguments.batch, "process_seconds": process / arguments.batch}
        if way != "cached":
            differences[medium if way == "anew" else f"{medium}_{way}"] = float((answer - first[medium]).abs().max())
        first.setdefault(medium, answer)
        if arguments.output:
            write_record(arguments.output, result)
    result["text_speedup"] = result["text_anew"]["process_seconds_per_token"] / result["text_cached"]["process_seconds_per_token"]
    result["picture_speedup"] = result["picture_anew"]["process_seconds"] / result["picture_cached"]["process_seconds"]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON object, and return it."""
    from megatron.core import parallel_state, tensor_parallel

    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    init_distributed()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    with tempfile.TemporaryDirectory() as folder:
        engine = load_engine(arguments.model, LoadOptions()) if arguments.model else random_engine(arguments.config, Path(folder))
        asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items() if name != "output"}
        result = {"asked": asked, "device": device_name(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        measure(engine, arguments, result)
    shutdown_distributed()
    report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
