"""Answers to a benchmark's questions in the layout its scorer expects: ``python -m megatron_bagel.evaluate geneval FILE --model DIR``."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_bagel import platform
from megatron_bagel.common.json_text import json_lines
from megatron_bagel.inference.batch.arguments import build_parser as generation_parser
from megatron_bagel.inference.batch.arguments import parse_arguments, parse_size
from megatron_bagel.inference.batch.benchmarks import BENCHMARKS, BenchmarkItem, read_benchmark
from megatron_bagel.inference.batch.prompts import Prompt
from megatron_bagel.inference.batch.results import RESULTS
from megatron_bagel.inference.batch.run import run_prompts
from megatron_bagel.platform.launch.process_group import launched_rank, shutdown_distributed

_PROG = "python -m megatron_bagel.evaluate"
_EPILOG = """The options are those of megatron_bagel.generate; what a benchmark was measured with is set already, and what you give
wins. OUT/answers holds what was generated and OUT/scored what the scorer reads. A run that was interrupted goes on with --resume."""


def build_parser(prog: str = _PROG) -> argparse.ArgumentParser:
    """The command line: generation's own, and the benchmark."""
    parser = generation_parser()
    parser.prog, parser.epilog = prog, _EPILOG
    parser.description = "Answer the questions of a benchmark and write them where its scorer looks."
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS), help="decides how QUESTIONS are read and what is written")
    parser.add_argument("questions", type=Path, metavar="QUESTIONS", help="the benchmark's file, or folder of files")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.set_defaults(out="evaluation")
    return parser


def parse(argv: Sequence[str], prog: str = _PROG) -> Namespace:
    """Arguments, with the benchmark's settings where none is given."""
    parser = build_parser(prog)
    parser.set_defaults(**BENCHMARKS[parse_arguments(argv, parser).benchmark].options)
    return parse_arguments(argv, parser)


def run(args: Namespace) -> int:
    """Read, answer, hand on; returns how many answers there are. Raises ValueError for what cannot be."""
    if args.input or getattr(args, "terms", None):
        raise ValueError("the questions come from the benchmark: leave --input, --prompt and --image out")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit is {args.limit}; it must be at least 1")
    out = Path(args.out)
    items = read_benchmark(args.benchmark, args.questions, out / "pictures")[: args.limit]
    size = parse_size(args.image_size) if args.image_size else None
    options = Namespace(**{name: value for name, value in vars(args).items() if name not in ("benchmark", "questions", "limit")})
    options.out = str(out / "answers")
    count = run_prompts(options, [_with_options(item.prompt, args, size) for item in items])
    if launched_rank() == 0:
        (out / "scored").mkdir(parents=True, exist_ok=True)
        answers = _answers(items, out / "answers", args.num_samples)
        BENCHMARKS[args.benchmark].write(items, answers, out / "answers", out / "scored")
        print(f"{count} answers to {len(items)} questions of {args.benchmark}: {out / 'scored'}")
    return count


def _with_options(prompt: Prompt, options: Namespace, size: tuple[int, int] | None) -> Prompt:
    return replace(prompt, think=options.think, system_prompt=options.system_prompt, size=size if prompt.output == "image" else None)


def _answers(items: Sequence[BenchmarkItem], folder: Path, samples: int) -> dict[str, list[dict[str, Any]]]:
    """Lines of results.jsonl by the name of their prompt."""
    found = {record["id"]: record for _, record in json_lines(folder / RESULTS)}
    names = {item.prompt.name for item in items}
    return {name: [found[name]] if samples == 1 else [found[f"{name}_{n}"] for n in range(samples)] for name in names}


def main(argv: Sequence[str] | None = None, prog: str = _PROG) -> int:
    """Entry point; mistakes of the user end with one sentence and status 2."""
    args = parse(sys.argv[1:] if argv is None else argv, prog)
    platform.install()
    try:
        run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        shutdown_distributed()
    return 0
