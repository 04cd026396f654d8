# SPDX-License-Identifier: Apache-2.0
"""The command line of generation: every option of the original's inferencer in one ``--help``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from megatron_bagel.common.flag_names import CommandParser
from megatron_bagel.common.json_text import MAX_JSON_DEPTH
from megatron_bagel.common.paths import location_flag
from megatron_bagel.common.text_limits import MAX_TEXT_BYTES, TextLimits
from megatron_bagel.data.transforms import EXIF_MODES

_DESCRIPTION = "Pictures from prompts, edited pictures, and answers about pictures, from a trained model."
_EPILOG = """examples:
  a picture        --model DIR --prompt "a red circle" --image-size 64x64 --out pictures
  an answer        --model DIR --task understand --image photo.png --prompt "what color is it?"
  an edit          --model DIR --task edit --image photo.png --prompt "make it blue" --cfg-interval 0 1 --cfg-renorm-type text_channel
  mixed input      --model DIR --task interleave --prompt "in the style of" --image a.png --prompt "draw" --image b.png
  many prompts     --model DIR --input prompts.jsonl --out answers
  a page           --model DIR --serve

The settings of BAGEL's demo: pictures --cfg-text-scale 4; edits --cfg-text-scale 4 --cfg-img-scale 2
--cfg-interval 0 1 --cfg-renorm-type text_channel. Both spellings, --cfg-text-scale and --cfg_text_scale, are accepted.
"""


class _AppendInOrder(argparse.Action):
    """Keeps --prompt and --image in the order in which they were given."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        kind = "text" if self.dest == "prompt" else "image"
        namespace.terms = [*(getattr(namespace, "terms", None) or []), *((kind, value) for value in values)]


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of ``megatron_bagel.generate``; defaults are those of the original's inferencer."""
    parser = CommandParser(
        prog="python -m megatron_bagel.generate",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(parser.add_argument_group("model"))
    _add_prompts(parser.add_argument_group("prompts"))
    _add_text(parser.add_argument_group("text"))
    _add_image(parser.add_argument_group("pictures"))
    _add_serve(parser.add_argument_group("page"))
    return parser


def _add_model(group: Any) -> None:
    group.add_argument(
        "--model",
        required=True,
        type=location_flag,
        metavar="DIR",
        help="Hugging Face folder, training checkpoint, folder of checkpoints, or owner/name[@revision] on a hub",
    )
    group.add_argument("--weights", choices=("ema", "model"), help="averaged or last weights (default: ema where there is one)")
    group.add_argument(
        "--adapter",
        type=location_flag,
        metavar="DIR",
        help="adapter (LoRA) of the model: a PEFT folder, owner/name on a hub, or a training checkpoint of adapters",
    )
    group.add_argument(
        "--weights-name",
        "--weights_name",
        metavar="NAME",
        help="weight file of a model folder with another name, such as ema_bf16.safetensors",
    )
    group.add_argument(
        "--llm-path",
        "--llm_path",
        type=location_flag,
        metavar="DIR",
        help="config.json and tokenizer of the decoder, for a folder without llm_config.json",
    )
    group.add_argument(
        "--vit-path", "--vit_path", type=location_flag, metavar="DIR", help="config.json of the ViT, for a folder without vit_config.json"
    )
    group.add_argument("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    group.add_argument("--tokenizer", type=location_flag, metavar="PATH", help="folder or SentencePiece .model (default: the model's own)")
    group.add_argument("--autoencoder", type=location_flag, metavar="FILE", help="ae.safetensors (default: the model's own)")
    group.add_argument(
        "--check-weights", "--check_weights", choices=("sampled", "full"), default="sampled",
        help="weights must be finite: check some thousand values of each tensor, or all of them (default: sampled)",
    )  # fmt: skip
    group.add_argument("--max-latent-size", type=int, metavar="N", help="side of the latent position table (default: as stored)")
    group.add_argument(
        "--tensor-model-parallel-size", type=int, default=1, metavar="N",
        help="processes that share the decoder, started by torchrun; more processes answer prompts side by side (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--expert-model-parallel-size", type=int, default=1, metavar="N",
        help="parts of the processes that share the decoder; each has a part of the sparse experts (default: 1, which splits every expert)",
    )  # fmt: skip
    group.add_argument("--interpolate-pos", action="store_true", default=None, help="spread positions over the whole table")


def _add_prompts(group: Any) -> None:
    group.add_argument("--task", choices=("t2i", "edit", "understand", "interleave"), default="t2i", help="default: %(default)s")
    group.add_argument(
        "--prompt", action=_AppendInOrder, nargs="+", metavar="TEXT", help="texts; each a prompt of its own, except in interleave"
    )
    group.add_argument(
        "--image", action=_AppendInOrder, nargs="+", type=location_flag, metavar="FILE", help="input images, shown before every prompt"
    )
    group.add_argument(
        "--input", type=location_flag, metavar="FILE", help="JSONL with one prompt per line (docs/generation.md lists its keys)"
    )
    group.add_argument(
        "--output",
        choices=("image", "text"),
        nargs="+",
        metavar="KIND",
        help="what interleave produces: image (default), text, or several in order",
    )
    group.add_argument(
        "--out",
        default="generated",
        type=location_flag,
        metavar="DIR",
        help="folder for results.jsonl and PNG files (default: %(default)s)",
    )
    group.add_argument("--resume", action="store_true", help="keep the answers that --out already holds and make the others")
    group.add_argument("--seed", type=int, default=0, help="same seed, same answers, whatever the batch (default: %(default)s)")
    group.add_argument("--num-samples", type=int, default=1, metavar="N", help="answers per prompt, seeds counting up (default: 1)")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts worked on at once (default: %(default)s)")
    group.add_argument(
        "--exif", choices=EXIF_MODES, default=EXIF_MODES[0],
        help="turn input images as their EXIF orientation says, as viewers show them; ignore: the original's way (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--max-text-bytes", type=int, default=MAX_TEXT_BYTES, metavar="N",
        help="refuse lines of --input and of questions, and prompts, with more bytes (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--max-json-depth", type=int, default=MAX_JSON_DEPTH, metavar="N", help="refuse JSON that is nested deeper (default: %(default)s)"
    )
    sides = {"type": int, "nargs": 2, "metavar": ("MAX", "MIN")}
    group.add_argument("--vae-transform", **sides, help="longest and shortest side of input images for the autoencoder (default: 1024 512)")
    group.add_argument("--vit-transform", **sides, help="the same for the vision tower (default: 980 224)")


def _add_text(group: Any) -> None:
    group.add_argument("--think", action="store_true", default=False, help="reason in words before answering or drawing")
    group.add_argument("--system-prompt", metavar="TEXT", help="replaces the request to think that --think puts first")
    group.add_argument(
        "--max-length", type=int, default=1000, metavar="N", help="most tokens of a text, opening one counted (default: 1000)"
    )
    group.add_argument(
        "--static-cache", action="store_true", help="write text with tensors of fixed shapes, on a GPU as one captured graph per token"
    )
    group.add_argument("--do-sample", action="store_true", help="sample instead of taking the likeliest token")
    group.add_argument("--temperature", type=float, default=0.3, help="of sampling (default: %(default)s)")
    group.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest tokens of this mass (default: %(default)s)")


def _add_image(group: Any) -> None:
    group.add_argument("--image-size", metavar="HxW", help="pixels (default: the last input image's, else 1024x1024 or the model's most)")
    group.add_argument(
        "--num-timesteps", type=int, default=50, metavar="N", help="points in time; N make N - 1 steps (default: %(default)s)"
    )
    group.add_argument("--timestep-shift", type=float, default=3.0, help="above 1 spends more steps near the noise (default: %(default)s)")
    group.add_argument("--cfg-text-scale", type=float, default=3.0, help="pull towards the text; 1 is off (default: %(default)s)")
    group.add_argument("--cfg-img-scale", type=float, default=1.5, help="pull towards the input images, with text guidance (default: 1.5)")
    group.add_argument(
        "--cfg-interval", type=float, nargs=2, default=(0.4, 1.0), metavar=("LOW", "HIGH"), help="times with guidance (0.4 1)"
    )
    group.add_argument("--cfg-renorm-type", choices=("global", "channel", "text_channel"), default="global", help="default: %(default)s")
    group.add_argument("--cfg-renorm-min", type=float, default=0.0, help="least factor of renormalisation; 1 is off (default: %(default)s)")
    group.add_argument("--cfg-couple-batch", action="store_true", help="one norm for all pictures of a batch, as in the original")
    group.add_argument(
        "--capture-steps", action="store_true",
        help="on a GPU replay the steps of a picture as captured graphs, which the host launches at once",
    )  # fmt: skip
    group.add_argument("--enable-taylorseer", action="store_true", help="refused: this approximation of the original is not offered")


def _add_serve(group: Any) -> None:
    group.add_argument("--serve", action="store_true", help="show a page to draw and to talk about pictures (needs gradio)")
    group.add_argument("--host", default="127.0.0.1", help="address of the page; others than the default let others use it")
    group.add_argument("--port", type=int, default=7860, metavar="N", help="default: %(default)s")


def parse_size(text: str) -> tuple[int, int]:
    """Parse "HxW" as (height, width)."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() for side in sides):
        raise ValueError(f"--image-size {text} is not of the form HxW, for example 512x768")
    return int(sides[0]), int(sides[1])


def text_limits(args: argparse.Namespace) -> TextLimits:
    """Return the limits of prompts and questions. Raises ValueError naming the flag of an impossible one."""
    return TextLimits(args.max_text_bytes, args.max_json_depth)


def parse_arguments(argv: Sequence[str], parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse ``argv`` with ``parser`` (default: generation's); underscores in flag names count as dashes."""
    dashed_words = []
    for word in argv:
        name, equals, value = word.partition("=")
        dashed_words.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return (parser or build_parser()).parse_args(dashed_words)
