# SPDX-License-Identifier: Apache-2.0
"""Make a complete small training set from nothing: pictures of coloured shapes in BAGEL's data formats, a tokenizer and model configs.

    %(prog)s OUT --t2i 2000 --edit 2000 --vlm 2000

OUT gets the guide's data folders, `tokenizer/`, `llm/` (Qwen2 config and the tokenizer's files), `vit/` (SigLIP config), `vae/` (an
autoencoder trained on such pictures), `dataset.yaml`, from which an index is built, `train.yaml` to train with, and `world.json`, which
describes the set. OUT appears only when it is complete.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_bagel.cli.usage import command_parser
from megatron_bagel.common.paths import path_flag
from megatron_bagel.common.writable import check_writable, writing_to
from megatron_bagel.data.keyed_random import keyed_generator
from megatron_bagel.sample_world.folders import WEIGHTS, FolderSpec
from megatron_bagel.sample_world.text import EDITS, QUESTION_KINDS, SINGLE_EDITS, draw_edit
from megatron_bagel.sample_world.training_set import LLMSize, ViTSize, make_training_set
from megatron_bagel.sample_world.world import SHAPES, SIZES, World, draw_scene, parse_pairs


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("out", type=path_flag, metavar="OUT", help="folder to make; must not exist yet, or be empty")
    parser.add_argument("--t2i", type=int, default=1000, metavar="N", help="pictures with captions (default 1000)")
    parser.add_argument("--edit", type=int, default=1000, metavar="N", help="editing examples (default 1000)")
    parser.add_argument("--vlm", type=int, default=1000, metavar="N", help="pictures with questions and answers (default 1000)")
    parser.add_argument("--text", type=int, default=0, metavar="N", help="plain texts (default 0, which makes no such group)")
    parser.add_argument("--interleaved", type=int, default=0, metavar="N", help="puzzles: a question in words, a thought and a picture in "
                        "one sample (default 0, which makes no such group)")  # fmt: skip
    parser.add_argument("--interleaved-weight", type=float, default=1.0, metavar="W", help="weight of the puzzles (default 1)")
    parser.add_argument("--weights", type=float, nargs=4, default=list(WEIGHTS.values()), metavar=("T2I", "EDIT", "VLM", "TEXT"),
                        help=f"weight of each kind in training (default: {' '.join(map(str, WEIGHTS.values()))})")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of pictures and texts (default 0)")
    world = parser.add_argument_group("the world")
    world.add_argument("--image-size", nargs="+", default=["64"], metavar="SIZE",
                       help="64, or WxH; of several sizes, each picture draws one (default 64)")  # fmt: skip
    world.add_argument("--max-count", type=int, default=1, metavar="N", help="shapes per picture, 1 to N (default 1)")
    world.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="SHAPE", help=f"of {', '.join(SHAPES)} (default all)")
    world.add_argument("--sizes", nargs="+", default=["large"], metavar="SIZE", help=f"of {', '.join(SIZES)} (default large)")
    world.add_argument("--hold-out", nargs="+", default=[], metavar="COLOUR:SHAPE", help="pairs that never appear, for tests")
    words = parser.add_argument_group("the words")
    words.add_argument("--captions-per-image", type=int, default=2, metavar="N", help="wordings per caption, 1 or 2 (default 2)")
    words.add_argument("--questions-per-image", type=int, default=2, metavar="N", help="questions per conversation (default 2)")
    words.add_argument("--edit-steps", type=int, default=1, metavar="N", help="edits per example, 1 to N (default 1)")
    words.add_argument("--edit-kinds", nargs="+", default=None, metavar="KIND",
                       help=f"of {', '.join(EDITS)} (default: {', '.join(SINGLE_EDITS)})")  # fmt: skip
    words.add_argument("--edit-max-count", type=int, default=None, metavar="N",
                       help="shapes of a picture that is edited, 1 to N (default: --max-count)")  # fmt: skip
    words.add_argument("--question-kinds", nargs="+", default=list(QUESTION_KINDS), metavar="KIND",
                       help=f"what questions ask for, of {', '.join(QUESTION_KINDS)} (default all)")  # fmt: skip
    words.add_argument("--vocab-size", type=int, default=512, help="largest number of tokens of the tokenizer (default 512)")
    add_model_flags(parser)
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that set the sizes of the model configs."""
    model = parser.add_argument_group("the model configs")
    model.add_argument("--hidden-size", type=int, default=128, help="hidden size of the decoder (default 128)")
    model.add_argument("--layers", type=int, default=6, help="layers of the decoder (default 6)")
    model.add_argument("--initializer-range", type=float, default=None, metavar="STD",
                       help="deviation of the decoder's first weights (default: 0.7 / sqrt(hidden size))")  # fmt: skip
    model.add_argument("--vit-hidden-size", type=int, default=96, help="hidden size of the vision transformer (default 96)")
    model.add_argument(
        "--vit-layers", type=int, default=4, help="layers of the vision transformer, including the unused last one (default 4)"
    )
    model.add_argument(
        "--vit-image-size",
        type=int,
        default=None,
        metavar="N",
        help="longest side in pixels at which the ViT sees pictures; fewer patches train faster (default: their own)",
    )
    model.add_argument(
        "--vit-patches-per-side", type=int, default=10, help="side of the largest image that the ViT can address, in patches (default 10)"
    )


def parse_sizes(texts: list[str]) -> tuple[tuple[int, int], ...]:
    """Return (width, height) in pixels of each size: ["64", "96x64"] gives ((64, 64), (96, 64))."""
    sizes: list[tuple[int, int]] = []
    for text in texts:
        width, _, height = text.partition("x")
        if not width.isdigit() or not (height or width).isdigit():
            raise ValueError(f"--image-size: '{text}' is neither a number of pixels nor WIDTHxHEIGHT")
        sizes.append((int(width), int(height or width)))
    return tuple(sizes)


def spec_of(args: argparse.Namespace) -> FolderSpec:
    """Return the typed settings of the command line. Raises ValueError with the setting that cannot work."""
    world = World(shapes=tuple(args.shapes), sizes=tuple(args.sizes), max_count=args.max_count,
                  picture_sizes=parse_sizes(args.image_size), held_out=parse_pairs(args.hold_out))  # fmt: skip
    kinds = tuple(args.edit_kinds) if args.edit_kinds else None
    spec = FolderSpec(world, args.seed, args.t2i, args.edit, args.vlm, args.text, args.captions_per_image,
                      args.questions_per_image, args.edit_steps, kinds, args.edit_max_count, tuple(args.question_kinds),
                      tuple(args.weights), vit_side=args.vit_image_size, interleaved=args.interleaved,
                      interleaved_weight=args.interleaved_weight)  # fmt: skip
    rng = keyed_generator(args.seed, "check")
    draw_edit(draw_scene(spec.edit_world, rng), spec.edit_world, rng, kinds)  # refuses unknown kinds before anything is written
    return spec


def main(argv: Sequence[str] | None = None, prog: str = "megatron-bagel data sample") -> int:
    """Make the set. Errors of the input end with one line and exit status 2."""
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    llm = LLMSize(args.hidden_size, args.layers, args.initializer_range)
    vit = ViTSize(args.vit_hidden_size, args.vit_layers, args.vit_patches_per_side)
    try:
        spec = spec_of(args)
        check_writable(args.out, "OUT")
        with writing_to(args.out, "OUT"):
            tokens = make_training_set(args.out, spec, args.vocab_size, llm, vit)
    except ValueError as error:
        parser.error(str(error))
    counts = f"{spec.t2i} t2i, {spec.edit} edit, {spec.vlm} vlm, {spec.text} text samples"
    if spec.interleaved:
        counts += f", {spec.interleaved} puzzles"
    print(f"{args.out.resolve()}: {counts}; a tokenizer of {tokens} tokens")
    return 0
