# SPDX-License-Identifier: Apache-2.0
"""Pictures from prompts, edited pictures, and answers about pictures: ``python -m megatron_bagel.generate --help``."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from megatron_bagel import platform
from megatron_bagel.cli.usage import report_error
from megatron_bagel.inference.batch.arguments import build_parser, parse_arguments, parse_size, text_limits
from megatron_bagel.inference.batch.prompts import Prompt, make_prompt, read_prompts
from megatron_bagel.inference.batch.run import run_prompts
from megatron_bagel.inference.web.serve import serve
from megatron_bagel.platform.launch.process_group import launched_rank, shutdown_distributed


def collect_prompts(args: Namespace) -> list[Prompt]:
    """Return the prompts of the command line or of ``--input``. Raises ValueError for none, or for both."""
    size = parse_size(args.image_size) if args.image_size else None
    settings: dict[str, Any] = {"think": args.think, "system_prompt": args.system_prompt, "size": size}
    terms: list[tuple[str, str]] = getattr(args, "terms", None) or []
    if args.system_prompt and not args.think:
        raise ValueError("--system-prompt replaces the prompt of --think; pass --think as well")
    if args.input:
        if terms:
            raise ValueError("give either --input or --prompt and --image, not both")
        return read_prompts(args.input, args.task, settings, text_limits(args))
    if args.task == "interleave":
        return [make_prompt("00000", "interleave", (), (), terms, args.output, text_limits(args), **settings)]
    texts, images = ([value for kind, value in terms if kind == term_kind] for term_kind in ("text", "image"))
    if not texts:
        raise ValueError("there is nothing to do: give --prompt TEXT or --input FILE")
    limits = text_limits(args)
    return [make_prompt(f"{i:05d}", args.task, [text], images, (), args.output, limits, **settings) for i, text in enumerate(texts)]


def main(argv: Sequence[str] | None = None, prog: str = "python -m megatron_bagel.generate") -> int:
    """Run the command. Returns the exit status: 2 after an error of the user, which is printed as one sentence."""
    parser = build_parser()
    parser.prog = prog
    args = parse_arguments(sys.argv[1:] if argv is None else argv, parser)
    platform.install()
    try:
        if args.serve:
            serve(args)
            return 0
        count = run_prompts(args, collect_prompts(args))
    except ValueError as error:
        report_error(prog, error)
        return 2
    finally:
        shutdown_distributed()
    if launched_rank() == 0:
        print(f"{count} answers in {args.out}/results.jsonl")
    return 0
