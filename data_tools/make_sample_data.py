"""Makes a complete small training set from nothing: pictures of coloured shapes in BAGEL's data formats, a tokenizer, model configs.

    python data_tools/make_sample_data.py OUT --t2i 2000 --edit 2000 --vlm 2000

Beside the data folders of the guide, OUT gets `tokenizer/`, `llm/` (Qwen2 config and the tokenizer's files), `vit/` (SigLIP config),
`dataset.yaml` for `build_index.py`, and `world.json`, which says what was made. OUT appears only when it is complete.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_bagel.data.keyed_random import keyed_generator
from megatron_bagel.sample_world.folders import WEIGHTS, FolderSpec, write_folders, write_yaml
from megatron_bagel.sample_world.text import EDITS, captions, draw_edit, questions
from megatron_bagel.sample_world.tokenizer_training import train_tokenizer
from megatron_bagel.sample_world.world import SHAPES, SIZES, World, draw_scene, parse_pairs

VOCAB_MULTIPLE = 64  # the model's vocabulary is padded to it, as real ones are: it divides by tensor-parallel sizes
TOKENIZER_SCENES = 2000


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist yet, or be empty")
    parser.add_argument("--t2i", type=int, default=1000, metavar="N", help="pictures with captions (default 1000)")
    parser.add_argument("--edit", type=int, default=1000, metavar="N", help="editing examples (default 1000)")
    parser.add_argument("--vlm", type=int, default=1000, metavar="N", help="pictures with questions and answers (default 1000)")
    parser.add_argument("--text", type=int, default=0, metavar="N", help="plain texts (default 0: no such group)")
    parser.add_argument("--weights", type=float, nargs=4, default=list(WEIGHTS.values()), metavar=("T2I", "EDIT", "VLM", "TEXT"),
                        help=f"how often each kind is drawn in training (default: {' '.join(map(str, WEIGHTS.values()))})")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other pictures (default 0)")
    world = parser.add_argument_group("the world")
    world.add_argument("--image-size", nargs="+", default=["64"], metavar="SIZE",
                       help="64, or WxH; several sizes are mixed, one drawn per picture (default 64)")  # fmt: skip
    world.add_argument("--max-count", type=int, default=1, metavar="N", help="shapes per picture, 1 to N (default 1)")
    world.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="SHAPE", help=f"of {', '.join(SHAPES)} (default all)")
    world.add_argument("--sizes", nargs="+", default=["large"], metavar="SIZE", help=f"of {', '.join(SIZES)} (default large)")
    world.add_argument("--hold-out", nargs="+", default=[], metavar="COLOUR:SHAPE", help="pairs that never appear, to test on")
    words = parser.add_argument_group("the words")
    words.add_argument("--captions-per-image", type=int, default=2, metavar="N", help="wordings per caption, 1 or 2 (default 2)")
    words.add_argument("--questions-per-image", type=int, default=2, metavar="N", help="questions per conversation (default 2)")
    words.add_argument("--edit-steps", type=int, default=1, metavar="N", help="edits per example, 1 to N (default 1)")
    words.add_argument("--edit-kinds", nargs="+", default=None, metavar="KIND", help=f"of {', '.join(EDITS)} (default all)")
    words.add_argument("--vocab-size", type=int, default=512, help="the tokenizer's tokens at most (default 512)")
    model = parser.add_argument_group("the model configs")
    model.add_argument("--hidden-size", type=int, default=128, help="of the decoder (default 128)")
    model.add_argument("--layers", type=int, default=6, help="of the decoder (default 6)")
    model.add_argument("--vit-hidden-size", type=int, default=96, help="of the vision transformer (default 96)")
    model.add_argument("--vit-layers", type=int, default=4, help="of the vision transformer, the unused last one included (default 4)")
    model.add_argument(
        "--vit-image-size",
        type=int,
        default=None,
        metavar="N",
        help="longest side in pixels at which the ViT sees pictures; fewer patches are learnt faster (default: their own)",
    )
    model.add_argument("--vit-patches-per-side", type=int, default=10, help="largest image the ViT can address (default 10)")
    return parser


def parse_sizes(texts: list[str]) -> tuple[tuple[int, int], ...]:
    """["64", "96x64"] → ((64, 64), (96, 64)): (width, height) in pixels."""
    sizes = []
    for text in texts:
        width, _, height = text.partition("x")
        if not width.isdigit() or not (height or width).isdigit():
            raise ValueError(f"--image-size: '{text}' is neither a number of pixels nor WIDTHxHEIGHT")
        sizes.append((int(width), int(height or width)))
    return tuple(sizes)


def spec_of(args: argparse.Namespace) -> FolderSpec:
    """The typed settings of the command line; ValueError names what cannot be."""
    world = World(shapes=tuple(args.shapes), sizes=tuple(args.sizes), max_count=args.max_count,
                  picture_sizes=parse_sizes(args.image_size), held_out=parse_pairs(args.hold_out))  # fmt: skip
    kinds = tuple(args.edit_kinds) if args.edit_kinds else None
    rng = keyed_generator(args.seed, "check")
    draw_edit(draw_scene(world, rng), world, rng, kinds)  # refuses unknown kinds before anything is written
    return FolderSpec(world, args.seed, args.t2i, args.edit, args.vlm, args.text, args.captions_per_image,
                      args.questions_per_image, args.edit_steps, kinds, tuple(args.weights), vit_side=args.vit_image_size)  # fmt: skip


def world_texts(spec: FolderSpec) -> Iterator[str]:
    """Sentences of the world to train the tokenizer on; from scenes of their own, so every word occurs even in tiny data sets."""
    for i in range(TOKENIZER_SCENES):
        rng = keyed_generator(spec.seed, "tokenizer", i)
        scene = draw_scene(spec.world, rng)
        yield from captions(scene, spec.world)
        yield from draw_edit(scene, spec.world, rng, spec.edit_kinds).instructions
        for question, answer in questions(scene, spec.world):
            yield question
            yield answer


def llm_config(vocab_size: int, hidden: int, layers: int) -> dict:
    """A Qwen2 config with heads of 32 channels, two of them per key/value head."""
    heads = max(2, hidden // 32)
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads // 2, "hidden_act": "silu", "max_position_embeddings": 4096,
        # The usual 0.02 is for widths of thousands: at small ones hardly any signal would pass at first.
        "initializer_range": round(0.7 * hidden**-0.5, 3), "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    }  # fmt: skip


def vit_config(hidden: int, layers: int, patches_per_side: int) -> dict:
    """A SigLIP vision config; its image size is what `vit_max_num_patch_per_side` must agree with."""
    return {
        "model_type": "siglip_vision_model", "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 32), "num_channels": 3, "image_size": 14 * patches_per_side, "patch_size": 14,
        "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0,
    }  # fmt: skip


def write_json(path: Path, content: dict) -> None:
    """A JSON file with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def make(args: argparse.Namespace) -> None:
    """Writes everything beside OUT and moves it into place at the end; ValueError where OUT already holds something."""
    spec = spec_of(args)
    out = args.out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{args.out} exists and is not empty; remove it or name another folder")
    partial = out.parent / f"{out.name}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    dataset = write_folders(spec, partial, out)
    write_yaml(dataset, partial / "dataset.yaml", "Made by make_sample_data.py: groups as in the data guide, and where they lie.")
    tokens = train_tokenizer(world_texts(spec), partial / "tokenizer", args.vocab_size)
    shutil.copytree(partial / "tokenizer", partial / "llm")
    write_json(partial / "llm/config.json", llm_config(tokens, args.hidden_size, args.layers))
    write_json(partial / "vit/config.json", vit_config(args.vit_hidden_size, args.vit_layers, args.vit_patches_per_side))
    told = dataclasses.asdict(spec)
    told["world"]["held_out"] = sorted(told["world"]["held_out"])
    write_json(partial / "world.json", told)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    print(f"{out}: {spec.t2i} t2i, {spec.edit} edit, {spec.vlm} vlm, {spec.text} text samples; a tokenizer of {tokens} tokens")


def main(argv: list[str] | None = None) -> None:
    """The command line; errors of the input end with one line and exit status 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        make(args)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
