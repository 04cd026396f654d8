# SPDX-License-Identifier: Apache-2.0
"""Prompts: the rules of each task, and the lines of a JSONL file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_bagel.common.json_files import json_lines
from megatron_bagel.common.json_text import check_encodable
from megatron_bagel.common.text_limits import DEFAULT_LIMITS, TextLimits
from megatron_bagel.data.transforms import EXIF_MODES, decode_rgb
from megatron_bagel.inference.batch.requests import OUTPUTS, Request

_SHOWN_NAME = 200  # characters of a file name in a message
TASKS = ("t2i", "edit", "understand", "interleave")
_KEYS = ("id", "task", "prompt", "image", "terms", "output", "think", "size", "seed", "system_prompt")


@dataclass(frozen=True)
class Prompt:
    """One prompt before its images are read. ``terms`` are ("text", text) and ("image", path) in order.

    ``outputs`` are the kinds of several items to make in order; empty for one answer of the kind ``output``.
    """

    name: str
    task: str
    terms: tuple[tuple[str, str], ...]
    output: str
    think: bool = False
    system_prompt: str | None = None
    size: tuple[int, int] | None = None
    seed: int | None = None
    outputs: tuple[str, ...] = ()

    def request(self, exif: str = EXIF_MODES[0]) -> Request:
        """Return the request with its images read as RGB. Raises ValueError naming a file that is no readable image."""
        terms = tuple(read_image(value, exif) if kind == "image" else value for kind, value in self.terms)
        return Request(terms, self.output, self.think, self.system_prompt, self.size, self.outputs)

    def check_files(self) -> None:
        """Check that all images exist, before a model is loaded for them. Raises ValueError naming an absent one."""
        for kind, value in self.terms:
            if kind == "image" and not _is_file(value):
                raise ValueError(f"{self.name}: image {value[:_SHOWN_NAME]} does not exist")

    def record(self) -> dict[str, Any]:
        """Return the part of the prompt that the results file repeats."""
        record = {"id": self.name, "task": self.task, "terms": [{kind: value} for kind, value in self.terms]}
        return {**record, "output": list(self.outputs)} if self.outputs else record


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name that no file can have: too long, with a NUL, or with half a character
        return False


def read_image(path: str | Path, exif: str = EXIF_MODES[0]) -> Image.Image:
    """Read an image file as RGB, with white for transparency and turned as ``exif`` says (``decode_rgb``)."""
    try:
        return decode_rgb(Path(path).read_bytes(), exif=exif)
    except (ValueError, OSError) as error:
        raise ValueError(f"image {path}: {error}") from error


def make_prompt(
    name: str,
    task: str,
    texts: Sequence[str],
    images: Sequence[str],
    terms: Sequence[tuple[str, str]] = (),
    output: str | Sequence[str] | None = None,
    limits: TextLimits = DEFAULT_LIMITS,
    **options: Any,
) -> Prompt:
    """Make a prompt after checking the rules of its task: images come first, then texts; ``interleave`` keeps ``terms`` in order.

    A list as ``output`` asks for several items in order, which only ``interleave`` makes.

    Raises ValueError with a message that begins with ``name``.
    """
    for text in (*texts, *(value for _, value in terms), *images, name):
        check_prompt_text(text, name, limits)
    if task not in TASKS:
        raise ValueError(f"{name}: task '{task}' is unknown; choose one of {', '.join(TASKS)}")
    if task == "interleave":
        if not terms:
            raise ValueError(f"{name}: task interleave needs terms, texts and images in their order")
        outputs = _outputs(output, name)
        if len(outputs) > 1 and options.get("think"):
            raise ValueError(f"{name}: think and several outputs exclude each other; ask for a text before the picture instead")
        return Prompt(name, task, tuple(terms), outputs[0], outputs=outputs if len(outputs) > 1 else (), **options)
    task_output = "text" if task == "understand" else "image"
    output = output[0] if isinstance(output, list | tuple) and len(output) == 1 else output
    if output not in (None, task_output):
        raise ValueError(f"{name}: task {task} gives {task_output}, not {output}; use task interleave to choose")
    if terms:
        raise ValueError(f"{name}: terms belong to task interleave; task {task} takes a prompt and images")
    if not texts or not all(text.strip() for text in texts):
        raise ValueError(f"{name}: task {task} needs a prompt that is not empty")
    if task == "t2i" and images:
        raise ValueError(f"{name}: task t2i takes no image; use task edit to change one, or understand to ask about one")
    if task == "edit" and not images:
        raise ValueError(f"{name}: task edit needs an image to change")
    ordered_terms = [("image", str(image)) for image in images] + [("text", text) for text in texts]
    return Prompt(name, task, tuple(ordered_terms), task_output, **options)


def _outputs(output: Any, name: str) -> tuple[str, ...]:
    """Return the kinds of the items to make: one, or several in order. Raises ValueError naming the prompt for an unknown one."""
    outputs = (output or "image",) if isinstance(output, str | None) else tuple(output) if isinstance(output, list | tuple) else ()
    if not outputs or any(kind not in OUTPUTS for kind in outputs):
        raise ValueError(f"{name}: output {output!r} is unknown; choose one of {', '.join(OUTPUTS)}, or a list of them")
    return outputs


def check_prompt_text(text: Any, label: str, limits: TextLimits = DEFAULT_LIMITS) -> None:
    """Raise ValueError, naming ``label``, if a value of a prompt is no text, is longer than allowed, or holds half a character."""
    if not isinstance(text, str):
        raise ValueError(f"{label}: expected a text, got {type(text).__name__}")
    if problem := limits.too_long(len(text.encode("utf-8", "surrogatepass"))):
        raise ValueError(f"{label}: a text has {problem}")
    try:
        check_encodable(text)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error


def read_prompts(path: str | Path, task: str, defaults: Mapping[str, Any], limits: TextLimits = DEFAULT_LIMITS) -> list[Prompt]:
    """Read the prompts of a JSONL file.

    A line is an object with ``prompt`` and optionally ``image`` (a path or a list of paths, relative to the file), ``task``, ``id``,
    ``think``, ``size`` ([height, width]), ``seed`` and ``system_prompt``. For task interleave it has ``terms`` ([{"text": ...},
    {"image": ...}]) and ``output`` (image, text,
    or a list of them to make in order) instead of prompt and image. ``task`` and ``defaults`` apply to lines without these keys.

    Raises:
        ValueError: Naming file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--input {path} does not exist")
    prompts: list[Prompt] = []
    for label, row in json_lines(path, "--input", limits):
        prompts.append(_parse(row, label, len(prompts), path.parent, task, defaults, limits))
    if not prompts:
        raise ValueError(f"--input {path} holds no prompt")
    name, count = Counter(prompt.name for prompt in prompts).most_common(1)[0]
    if count > 1:
        raise ValueError(f"--input {path}: id '{name}' occurs more than once, but it names the picture")
    return prompts


def _parse(
    row: dict[str, Any], label: str, number: int, folder: Path, task: str, defaults: Mapping[str, Any], limits: TextLimits
) -> Prompt:
    unknown = sorted(set(row) - set(_KEYS))
    if unknown:
        raise ValueError(f"{label}: unknown key {', '.join(unknown)}; known are {', '.join(_KEYS)}")
    row = {key: value for key, value in row.items() if value is not None}  # a key whose value is null is absent
    images = row.get("image", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"{label}: image is neither a path nor a list of paths")
    if not isinstance(row.get("terms", []), list):
        raise ValueError(f"{label}: terms is not a list of texts and images")
    _check_options(row, label, limits)
    options = {key: row.get(key, defaults.get(key)) for key in ("think", "size", "seed", "system_prompt")}
    if options["size"] is not None:
        options["size"] = _size(options["size"], label)
    name = str(row.get("id", f"{number:05d}"))
    if not name or any(c in name for c in "/\\\0") or name.startswith("."):
        raise ValueError(f"{label}: id '{name}' cannot name a file")
    terms = [_term(term, label, folder) for term in row.get("terms", [])]
    texts = [row["prompt"]] if "prompt" in row else []
    images = [str(folder / image) for image in images]
    try:
        return make_prompt(name, row.get("task", task), texts, images, terms, row.get("output"), limits, **options)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error


def _check_options(row: Mapping[str, Any], label: str, limits: TextLimits) -> None:
    if "seed" in row and (not isinstance(row["seed"], int) or isinstance(row["seed"], bool)):
        raise ValueError(f"{label}: seed is {row['seed']!r}, expected a whole number")
    if "think" in row and not isinstance(row["think"], bool):
        raise ValueError(f"{label}: think is {row['think']!r}, expected true or false")
    if "system_prompt" in row:
        check_prompt_text(row["system_prompt"], label, limits)


def _size(size: Any, label: str) -> tuple[int, int]:
    if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(side, int) for side in size)):
        raise ValueError(f"{label}: size is {size!r}, expected [height, width] in pixels")
    return size[0], size[1]


def _term(term: Any, label: str, folder: Path) -> tuple[str, str]:
    if not (isinstance(term, dict) and len(term) == 1 and set(term) <= {"text", "image"}):
        raise ValueError(f'{label}: a term is {term!r}, expected {{"text": ...}} or {{"image": ...}}')
    ((kind, value),) = term.items()
    if not isinstance(value, str):
        raise ValueError(f"{label}: a term holds {type(value).__name__}, expected a text")
    return kind, str(folder / value) if kind == "image" else value
