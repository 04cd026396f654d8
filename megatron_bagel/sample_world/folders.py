# SPDX-License-Identifier: Apache-2.0
"""Writes the sample world in exactly the folders and file schemas of BAGEL's data guide, so that one folder feeds both programs.

t2i/NNNN.parquet                      image (PNG bytes), captions (JSON dict as a string)
editing/seedxedit_multi/NNNN.parquet  image_list, instruction_list (per step a list of ways to put it)
editing/parquet_info/seedxedit_multi.json
vlm/images/N.png, vlm/llava_ov_si.jsonl
text/text.jsonl                       {"text": ...}; this project's addition, only on request
interleaved/rows.jsonl                puzzles (puzzles.py) and their pictures; likewise
dataset.yaml                          groups, weights, transforms and the location of the data
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from tqdm import tqdm

from megatron_bagel.data.keyed_random import keyed_generator
from megatron_bagel.sample_world.puzzles import draw_puzzle
from megatron_bagel.sample_world.text import QUESTION_KINDS, captions, draw_edit, questions
from megatron_bagel.sample_world.world import World, draw_scene, pick, render, to_png

T2I_SCHEMA = pa.schema([("image", pa.binary()), ("captions", pa.string())])
EDIT_SCHEMA = pa.schema([
    ("image_list", pa.list_(pa.field("element", pa.binary()))),
    ("instruction_list", pa.list_(pa.field("element", pa.list_(pa.field("element", pa.string()))))),
])  # fmt: skip

VAE_STRIDE, VIT_STRIDE = 16, 14  # pixels of a token's side

# Drawing from words needs the most examples. An editing example has three images and costs as much as two others.
WEIGHTS = {"t2i_pretrain": 1.0, "unified_edit": 0.25, "vlm_sft": 0.5, "text": 0.25}


@dataclass(frozen=True)
class FolderSpec:
    """How much of each kind to write, and how. Row i of a kind depends only on (world, seed, i), not on the counts."""

    world: World
    seed: int = 0
    t2i: int = 1000
    edit: int = 1000
    vlm: int = 1000
    text: int = 0
    captions_per_image: int = 2
    questions_per_image: int = 2
    edit_steps: int = 1
    edit_kinds: tuple[str, ...] | None = None
    #: Most shapes of a picture that is edited; None for the world's.
    edit_max_count: int | None = None
    question_kinds: tuple[str, ...] = QUESTION_KINDS
    #: How often each kind is drawn, in the order of WEIGHTS.
    weights: tuple[float, ...] = tuple(WEIGHTS.values())
    #: Longest side at which the vision tower sees pictures; None for their own.
    vit_side: int | None = None
    #: Puzzles, and how often they are drawn.
    interleaved: int = 0
    interleaved_weight: float = 1.0
    rows_per_file: int = 500
    rows_per_group: int = 100

    def __post_init__(self) -> None:
        """Check the counts. Raises ValueError naming the flag if they make no dataset."""
        counts = (self.t2i, self.edit, self.vlm, self.text, self.interleaved)
        if min(counts) < 0 or not any(counts):
            raise ValueError("--t2i, --edit, --vlm, --text and --interleaved are counts of samples: not negative, and not all zero")
        if self.interleaved_weight <= 0:
            raise ValueError(f"--interleaved-weight must be above 0, not {self.interleaved_weight}")
        if self.interleaved and self.world.max_count > 1:
            raise ValueError("--interleaved makes puzzles about one shape, and --max-count allows several; leave one of the two out")
        if self.edit_max_count is not None and not 1 <= self.edit_max_count <= len(self.world.positions):
            raise ValueError(
                f"--edit-max-count: an edited picture holds 1 to {len(self.world.positions)} shapes, not {self.edit_max_count}"
            )
        if len(self.weights) != len(WEIGHTS) or min(self.weights) <= 0:
            raise ValueError(f"--weights takes {len(WEIGHTS)} numbers above 0, for {', '.join(WEIGHTS)}; got {self.weights}")
        if self.vit_side is not None and self.vit_side < VIT_STRIDE:
            raise ValueError(f"--vit-image-size must be {VIT_STRIDE} or more, one patch of the vision tower, not {self.vit_side}")
        unknown = [kind for kind in self.question_kinds if kind not in QUESTION_KINDS]
        if unknown:
            raise ValueError(f"--question-kinds must be some of {', '.join(QUESTION_KINDS)}; got {', '.join(self.question_kinds)}")
        scene = draw_scene(self.world, keyed_generator(self.seed, "check"))
        if not questions(scene, self.world, self.question_kinds):
            raise ValueError(f"--question-kinds {' '.join(self.question_kinds)}: a world like this one has no such question")
        positive_counts = ("captions_per_image", "questions_per_image", "edit_steps", "rows_per_file", "rows_per_group")
        for name in positive_counts:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(self, name)}")

    @property
    def edit_world(self) -> World:
        """The world of pictures that are edited."""
        return replace(self.world, max_count=self.edit_max_count or self.world.max_count)


def t2i_row(spec: FolderSpec, i: int) -> dict[str, Any]:
    """Return row i of the text-to-image data: a picture and its captions."""
    scene = draw_scene(spec.world, keyed_generator(spec.seed, "t2i", i))
    wordings = captions(scene, spec.world)[: spec.captions_per_image]
    named = {f"caption_{n}" if n else "caption": text for n, text in enumerate(wordings)}
    return {"image": to_png(render(scene)), "captions": json.dumps(named)}


def edit_row(spec: FolderSpec, i: int) -> dict[str, Any]:
    """Return row i of the editing data: 2 to ``edit_steps`` + 1 pictures and the instruction for each step."""
    rng = keyed_generator(spec.seed, "edit", i)
    scene = draw_scene(spec.edit_world, rng)
    images, instructions = [to_png(render(scene))], []
    for _ in range(int(rng.integers(1, spec.edit_steps + 1))):
        edit = draw_edit(scene, spec.edit_world, rng, spec.edit_kinds)
        scene = edit.after
        images.append(to_png(render(scene)))
        instructions.append(list(edit.instructions))
    return {"image_list": images, "instruction_list": instructions}


def vlm_row(spec: FolderSpec, i: int) -> tuple[dict[str, Any], np.ndarray]:
    """Return line i of the conversations, and its picture: some questions about it with their answers, each asked once."""
    rng = keyed_generator(spec.seed, "vlm", i)
    scene = draw_scene(spec.world, rng)
    pairs = questions(scene, spec.world, spec.question_kinds)
    selected_pairs = [pairs[k] for k in rng.permutation(len(pairs))[: spec.questions_per_image]]
    turns = []
    for n, (question, answer) in enumerate(selected_pairs):
        turns.append({"from": "human", "value": question if n else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": i, "image": f"{i}.png", "conversations": turns}, render(scene)


def text_row(spec: FolderSpec, i: int) -> dict[str, Any]:
    """Return line i of the plain text: a caption without its picture."""
    rng = keyed_generator(spec.seed, "text", i)
    return {"text": pick(rng, captions(draw_scene(spec.world, rng), spec.world))}


def interleaved_row(spec: FolderSpec, i: int) -> tuple[dict[str, Any], np.ndarray]:
    """Return line i of the interleaved data, and its picture: a puzzle."""
    rng = keyed_generator(spec.seed, "interleaved", i)
    puzzle = draw_puzzle(draw_scene(spec.world, rng), spec.world, rng)
    return {"prompt": puzzle.question, "thought": puzzle.thought, "target": f"{i}.png"}, render(puzzle.scene)


def write_folders(spec: FolderSpec, root: Path, final: Path) -> dict[str, Any]:
    """Write the data under ``root`` for later use at ``final``, which paths inside the files name; return the dataset YAML."""
    dataset: dict[str, Any] = {}
    dataset_info: dict[str, Any] = {}
    size = _transform_sizes(spec.world, spec.vit_side)
    if spec.t2i:
        counts = _write_parquet(root / "t2i", T2I_SCHEMA, t2i_row, spec, spec.t2i, "t2i")
        args = {"image_transform_args": dict(size["vae"])}
        dataset["t2i_pretrain"] = {"dataset_names": ["t2i"], **args, **_weight(spec, "t2i_pretrain", [len(counts)])}
        dataset_info["t2i_pretrain"] = {"t2i": {"data_dir": str(final / "t2i"), "num_files": len(counts), "num_total_samples": spec.t2i}}
    if spec.edit:
        counts = _write_parquet(root / "editing/seedxedit_multi", EDIT_SCHEMA, edit_row, spec, spec.edit, "edit")
        folder, info = final / "editing/seedxedit_multi", final / "editing/parquet_info/seedxedit_multi.json"
        table = {str(folder / name): {"num_row_groups": groups, "num_rows": rows} for name, groups, rows in counts}
        (root / "editing/parquet_info").mkdir(parents=True)
        (root / "editing/parquet_info/seedxedit_multi.json").write_text(json.dumps(table, indent=1) + "\n")
        dataset["unified_edit"] = {
            "dataset_names": ["seedxedit_multi"],
            "image_transform_args": dict(size["vae"]),
            "vit_image_transform_args": dict(size["vit"]),
            **_weight(spec, "unified_edit", [len(counts)]),
        }
        dataset_info["unified_edit"] = {"seedxedit_multi": {
            "data_dir": str(folder), "num_files": len(counts), "num_total_samples": spec.edit, "parquet_info_path": str(info),
        }}  # fmt: skip
    if spec.vlm:
        _write_pictured_lines(root / "vlm", "llava_ov_si.jsonl", vlm_row, spec, spec.vlm, "image")
        dataset["vlm_sft"] = {
            "dataset_names": ["llava_ov"], "image_transform_args": dict(size["vit"]),
            "shuffle_lines": True, "shuffle_seed": 0, **_weight(spec, "vlm_sft", [spec.vlm]),
        }  # fmt: skip
        dataset_info["vlm_sft"] = {"llava_ov": {
            "data_dir": str(final / "vlm/images"), "jsonl_path": str(final / "vlm/llava_ov_si.jsonl"), "num_total_samples": spec.vlm,
        }}  # fmt: skip
    if spec.text:
        (root / "text").mkdir()
        _write_lines(root / "text/text.jsonl", (text_row(spec, i) for i in _progress(spec.text, "text")))
        dataset["text"] = {"dataset_names": ["text"], **_weight(spec, "text", [spec.text])}
        dataset_info["text"] = {"text": {"jsonl_path": str(final / "text/text.jsonl"), "num_total_samples": spec.text}}
    if spec.interleaved:
        _write_pictured_lines(root / "interleaved", "rows.jsonl", interleaved_row, spec, spec.interleaved, "target")
        dataset["interleaved"] = {
            "dataset_names": ["puzzles"], "format": "think_then_draw", "image_transform_args": dict(size["vae"]),
            "vit_image_transform_args": dict(size["vit"]), "is_mandatory": True, "weight": spec.interleaved_weight,
        }  # fmt: skip
        dataset_info["interleaved"] = {"puzzles": {
            "data_dir": str(final / "interleaved/images"), "jsonl_path": str(final / "interleaved/rows.jsonl"),
        }}  # fmt: skip
    return {**dataset, "dataset_info": dataset_info}


def write_yaml(content: dict[str, Any], path: Path, comment: str) -> None:
    """Write a YAML file in the order of ``content``, with a comment on top."""
    path.write_text(f"# {comment}\n" + yaml.safe_dump(content, sort_keys=False))


def _weight(spec: FolderSpec, group: str, num_used_data: list[int]) -> dict[str, Any]:
    return {"is_mandatory": True, "num_used_data": num_used_data, "weight": spec.weights[list(WEIGHTS).index(group)]}


def _transform_sizes(world: World, vit_side: int | None) -> dict[str, dict[str, int]]:
    """Return transform settings that keep pictures near their sizes, or shrink the longest side to ``vit_side`` for the ViT."""
    sides = [side for size in world.picture_sizes for side in size]

    def args(stride: int, longest_side: int) -> dict[str, int]:
        target_sides = (longest_side, min(sides) * longest_side / max(sides))
        longest, shortest = (max(stride, math.ceil(side / stride) * stride) for side in target_sides)
        return {"image_stride": stride, "max_image_size": longest, "min_image_size": shortest}

    return {"vae": args(VAE_STRIDE, max(sides)), "vit": args(VIT_STRIDE, vit_side or max(sides))}


def _progress(count: int, description: str) -> Iterable[int]:
    return tqdm(range(count), desc=description, unit="row", disable=None)


def _write_parquet(
    folder: Path, schema: pa.Schema, make: Callable[[FolderSpec, int], dict[str, Any]], spec: FolderSpec, count: int, description: str
) -> list[tuple[str, int, int]]:
    """Write rows 0 to count - 1 in files of ``rows_per_file``, with one row group in memory.

    Returns:
        File name, number of row groups and number of rows of each file.
    """
    folder.mkdir(parents=True)
    file_counts = []
    with tqdm(total=count, desc=description, unit="row", disable=None) as bar:
        for number, start in enumerate(range(0, count, spec.rows_per_file)):
            stop = min(start + spec.rows_per_file, count)
            name, groups = f"{number:04d}.parquet", 0
            with pq.ParquetWriter(folder / name, schema) as writer:
                for group_start in range(start, stop, spec.rows_per_group):
                    rows = [make(spec, i) for i in range(group_start, min(group_start + spec.rows_per_group, stop))]
                    writer.write_table(pa.Table.from_pylist(rows, schema=schema), row_group_size=len(rows))
                    groups += 1
                    bar.update(len(rows))
            file_counts.append((name, groups, stop - start))
    return file_counts


def _write_pictured_lines(
    folder: Path,
    name: str,
    make: Callable[[FolderSpec, int], tuple[dict[str, Any], np.ndarray]],
    spec: FolderSpec,
    count: int,
    picture: str,
) -> None:
    """Write lines 0 to count - 1 to ``name``, and their pictures, whose names are under the key ``picture``, to ``images``."""
    (folder / "images").mkdir(parents=True)

    def lines() -> Iterator[dict[str, Any]]:
        for i in _progress(count, folder.name):
            line, pixels = make(spec, i)
            (folder / "images" / line[picture]).write_bytes(to_png(pixels))
            yield line

    _write_lines(folder / name, lines())


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
