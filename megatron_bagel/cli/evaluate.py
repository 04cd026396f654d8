# SPDX-License-Identifier: Apache-2.0
"""Answers to a benchmark's questions in its scorer's format: ``python -m megatron_bagel.evaluate geneval FILE --model DIR``."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_bagel import platform
from megatron_bagel.cli.usage import report_error
from megatron_bagel.common.json_files import json_lines
from megatron_bagel.common.paths import path_flag
from megatron_bagel.common.writable import check_writable, writing_to
from megatron_bagel.inference.batch.arguments import build_parser as generation_parser
from megatron_bagel.inference.batch.arguments import parse_arguments, parse_size, text_limits
from megatron_bagel.inference.batch.benchmarks import BENCHMARKS, BenchmarkItem, ReadOptions, read_benchmark
from megatron_bagel.inference.batch.prompts import Prompt
from megatron_bagel.inference.batch.results import RESULTS
from megatron_bagel.inference.batch.run import run_prompts
from megatron_bagel.platform.launch.process_group import launched_rank, shutdown_distributed

_PROG = "python -m megatron_bagel.evaluate"
_EPILOG = """The options are those of megatron_bagel.generate. The benchmark sets the options that it was measured with; options that you
give win. OUT/answers holds the answers, and OUT/scored holds the scorer's input. --resume continues an interrupted run."""


def build_parser(prog: str = _PROG) -> argparse.ArgumentParser:
    """Return generation's parser with the benchmark's arguments added."""
    parser = generation_parser()
    parser.prog, parser.epilog = prog, _EPILOG
    parser.description = "Answer the questions of a benchmark and write them where its scorer looks."
    parser.add_argument(
        "benchmark", choices=sorted(BENCHMARKS), help="name of the benchmark, which sets the formats of QUESTIONS and of the scorer's input"
    )
    parser.add_argument("questions", type=path_flag, metavar="QUESTIONS", help="file of the benchmark, or folder of files")
    parser.add_argument("--limit", type=int, metavar="N", help="answer only the first N questions")
    parser.set_defaults(out="evaluation")
    return parser


def parse(argv: Sequence[str], prog: str = _PROG) -> Namespace:
    """Return the arguments, with the benchmark's settings for those that are not given."""
    parser = build_parser(prog)
    parser.set_defaults(**BENCHMARKS[parse_arguments(argv, parser).benchmark].options)
    return parse_arguments(argv, parser)


def run(args: Namespace) -> int:
    """Read the questions, answer them, and write the scorer's input. Returns the number of answers.

    Raises:
        ValueError: for options that contradict the benchmark, and for questions that cannot be read.
    """
    if args.input or getattr(args, "terms", None):
        raise ValueError("the questions come from the benchmark: leave --input, --prompt and --image out")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit is {args.limit}; it must be at least 1")
    out = Path(args.out)
    check_writable(out, "--out")
    with writing_to(out, "--out"):
        reading = ReadOptions(text_limits(args), args.exif)
        items = read_benchmark(args.benchmark, args.questions, out / "pictures", reading)[: args.limit]
    size = parse_size(args.image_size) if args.image_size else None
    options = Namespace(**{name: value for name, value in vars(args).items() if name not in ("benchmark", "questions", "limit")})
    options.out = str(out / "answers")
    count = run_prompts(options, [_with_options(item.prompt, args, size) for item in items])
    if launched_rank() == 0:
        answers = _answers(items, out / "answers", args.num_samples)
        with writing_to(out, "--out"):
            (out / "scored").mkdir(parents=True, exist_ok=True)
            BENCHMARKS[args.benchmark].write(items, answers, out / "answers", out / "scored")
        print(f"{count} answers to {len(items)} questions of {args.benchmark}: {out / 'scored'}")
    return count


def _with_options(prompt: Prompt, options: Namespace, size: tuple[int, int] | None) -> Prompt:
    return replace(prompt, think=options.think, system_prompt=options.system_prompt, size=size if prompt.output == "image" else None)


def _answers(items: Sequence[BenchmarkItem], folder: Path, samples: int) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of results.jsonl by the name of their prompt."""
    records = {record["id"]: record for _, record in json_lines(folder / RESULTS, "evaluate")}
    names = {item.prompt.name for item in items}
    return {name: [records[name]] if samples == 1 else [records[f"{name}_{n}"] for n in range(samples)] for name in names}


def main(argv: Sequence[str] | None = None, prog: str = _PROG) -> int:
    """Run the command. Returns the exit status: 2 after an error of the user, which is printed as one sentence."""
    args = parse(sys.argv[1:] if argv is None else argv, prog)
    platform.install()
    try:
        run(args)
    except ValueError as error:
        report_error(prog, error)
        return 2
    finally:
        shutdown_distributed()
    return 0
