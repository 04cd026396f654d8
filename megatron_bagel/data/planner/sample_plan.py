# SPDX-License-Identifier: Apache-2.0
"""What a sample shows in an epoch: which caption, which edit steps, which conditions are dropped; integers only.

The rules are the original's, but each draw is a pure function of (seed, dataset, row, epoch, its name). A sample's length is therefore
known before it is read, and no draw depends on another sample. One quirk of the original stays, because it shapes the mix of examples.
An editing chain of two steps with joined instructions ends one step early if it would end on the row's last image; the joined
instruction then has one part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_bagel.data.planner.cost_model import CostModel
from megatron_bagel.data.planner.interleaved_plan import interleaved_items
from megatron_bagel.data.planner.planned_item import ConditionDropout, Draws, PlannedItem
from megatron_bagel.data.sources.dataset_config import EDIT, INTERLEAVED, T2I, TEXT, VLM, GroupConfig
from megatron_bagel.data.sources.records import ANSWER_ITEM, CONTINUED, ENDED, IMAGE_ITEM, PLAIN, Record, instruction_index
from megatron_bagel.data.transforms import TransformArgs, output_size
from megatron_bagel.layout.items import Item
from megatron_bagel.layout.pack import LayoutSpec

MAX_CHAIN = 3  # images of an editing chain: one or two steps
JOIN_PROBABILITY = 0.5


@dataclass(frozen=True)
class PlanSettings:
    """The inputs of a sample's plan besides the sample. ``visual_und`` False leaves out the ViT images of editing samples."""

    seed: int
    layout: LayoutSpec
    dropout: ConditionDropout = ConditionDropout()
    visual_und: bool = True
    costs: CostModel = CostModel()

    @property
    def next_tokens(self) -> tuple[int, ...]:
        """Return the ids of ``stored_items.NEXT_TOKENS``."""
        layout = self.layout
        return layout.bos, layout.eos, layout.start_of_image, layout.end_of_image


def choose_items(record: Record, draws: Draws) -> list[PlannedItem]:
    """Choose the items of a sample in sequence order, before dropout."""
    if record.group == T2I:
        caption = draws.choice(len(record.text_tokens), "caption")
        return [PlannedItem("text", droppable=True, texts=(caption,)), PlannedItem("vae", loss=True, image=0)]
    if record.group == EDIT:
        return _choose_edit(record, draws)
    if record.group == INTERLEAVED:
        return interleaved_items(record, draws)
    return _turns(record)


def _choose_edit(record: Record, draws: Draws) -> list[PlannedItem]:
    images = len(record.widths)
    start = draws.choice(images - 1, "start")
    end = start + 1 + draws.choice(min(start + MAX_CHAIN, images) - start - 1, "end")
    items = _condition(start)
    if end - start > 1 and draws.chance(JOIN_PROBABILITY, "join"):
        if end == images - 1:
            end -= 1
        joined = tuple(_instruction(record, draws, start, step, CONTINUED if step else ENDED) for step in range(end - start))
        return [*items, PlannedItem("text", droppable=True, texts=joined), PlannedItem("vae", loss=True, image=end)]
    for step in range(end - start):
        items.append(PlannedItem("text", droppable=True, texts=(_instruction(record, draws, start, step, PLAIN),)))
        items.append(PlannedItem("vae", loss=True, image=start + step + 1))
        if start + step + 1 < end:
            items += _condition(start + step + 1)
    return items


def _condition(image: int) -> list[PlannedItem]:
    return [PlannedItem("vae", droppable=True, image=image), PlannedItem("vit", droppable=True, image=image)]


def _instruction(record: Record, draws: Draws, start: int, step: int, form: int) -> int:
    alternative = draws.choice(int(record.structure[start + step]), f"instruction{step}")
    return instruction_index(record.structure, len(record.widths), start + step, alternative, form)


def _turns(record: Record) -> list[PlannedItem]:
    items: list[PlannedItem] = []
    text = image = 0
    for code in record.structure:
        if code == IMAGE_ITEM:
            items.append(PlannedItem("vit", image=image))
            image += 1
        else:
            items.append(PlannedItem("text", loss=bool(code == ANSWER_ITEM), texts=(text,)))
            text += 1
    return items


def drop_conditions(items: Sequence[PlannedItem], dropout: ConditionDropout, draws: Draws) -> list[PlannedItem]:
    """Mark the conditions that dropout removes; each has a separate draw, in plan order."""
    return [
        replace(item, dropped=draws.chance(dropout.probability(item.kind, item.drop_probability), f"drop{position}"))
        if item.droppable
        else item
        for position, item in enumerate(items)
    ]


def transform_of(group: GroupConfig, kind: str) -> TransformArgs:
    """Return the transform of images of ``kind`` ("vit" or "vae") in a group. Raises ValueError if the config has none."""
    args = group.vit_image_transform if group.has_separate_vit and kind == "vit" else group.image_transform
    if args is None:
        raise ValueError(f"group {group.name} has images but no transform for them in the dataset config")
    return args


def shares_max_pixels(group: GroupConfig, kind: str) -> bool:
    """Return whether the pictures of a sample share ``max_pixels`` of the transform of ``kind``."""
    return group.name == VLM or (group.share_max_pixels and kind == "vit")


def build_items(
    planned: Sequence[PlannedItem], record: Record, group: GroupConfig, text_ids: Callable[[int], np.ndarray],
    next_tokens: Sequence[int] = (),
) -> tuple[Item, ...]:  # fmt: skip
    """Build items with their token ids, which ``text_ids`` reads, and image sizes after the transform.

    ``next_tokens`` are the ids of ``stored_items.NEXT_TOKENS``.
    """
    items = []
    for item in planned:
        label = next_tokens[item.next_token - 1] if item.next_token else None
        if item.kind == "text":
            texts = [text_ids(text) for text in item.texts]
            ids = texts[0] if len(texts) == 1 else np.concatenate(texts)
            items.append(Item("text", loss=item.loss, dropped=item.dropped, ids=ids, special_token_label=label))
        else:
            img_num = len(record.widths) if shares_max_pixels(group, item.kind) else 1
            size = (int(record.widths[item.image]), int(record.heights[item.image]))
            width, height = output_size(transform_of(group, item.kind), *size, img_num)
            items.append(
                Item(
                    item.kind,
                    loss=item.loss,
                    dropped=item.dropped,
                    image=item.image,
                    height=height,
                    width=width,
                    special_token_label=label,
                    split_start=item.split_start,
                    split_end=item.split_end,
                    frame_delta=item.frame_delta,
                )  # fmt: skip
            )
    return tuple(items)


def active_groups(groups: Sequence[GroupConfig], visual_gen: bool, visual_und: bool) -> tuple[list[GroupConfig], list[str]]:
    """Return the groups that a run with these flags can train on, and a sentence for each excluded one.

    Raises ValueError if no group remains.
    """
    active, reasons = [], []
    for group in groups:
        if group.makes_images and not visual_gen:
            reasons.append(f"group {group.name} is left out: it trains image generation, and --visual_gen is False")
        elif _needs_vit(group) and not visual_und:
            reasons.append(f"group {group.name} is left out: its images go through the ViT, and --visual_und is False")
        else:
            active.append(group)
    if not any(group.weight > 0 or group.is_mandatory for group in active):
        raise ValueError("no dataset group is left to train on: " + ("; ".join(reasons) or "every weight is 0"))
    return active, reasons


def _needs_vit(group: GroupConfig) -> bool:
    """Return whether the only pictures of a group are those of the vision tower."""
    return group.name == VLM or (group.name == INTERLEAVED and group.image_transform is None and group.vit_image_transform is not None)


def check_image_limits(group: GroupConfig, spec: LayoutSpec, visual_und: bool = True) -> None:
    """Check that a transform's images fit the model's position tables and its patches.

    With ``interpolate_pos`` positions are spread over the table, so there is no limit. Raises ValueError naming the YAML key and the
    flag.
    """
    if group.name == TEXT:
        return
    checks = []
    if group.makes_images:
        checks.append(("vae", "image_transform_args", spec.vae_downsample, spec.max_latent_size, "--max_latent_size"))
    if group.name == VLM or (group.has_separate_vit and visual_und and group.vit_image_transform is not None):
        key = "vit_image_transform_args" if group.has_separate_vit else "image_transform_args"
        checks.append(("vit", key, spec.vit_patch, spec.vit_max_side, "--vit_max_num_patch_per_side"))
    for kind, key, patch, side, flag in checks:
        args = transform_of(group, kind)
        where = f"group {group.name}, {key}"
        if args.image_stride % patch:
            raise ValueError(f"{where}: image_stride {args.image_stride} must be a multiple of {patch}, the pixels of one {kind} token")
        needed = -(-args.longest_side // patch)
        if needed > side and not spec.interpolate_pos:
            raise ValueError(
                f"{where}: max_image_size {args.max_image_size} gives up to {needed} tokens per side, but {flag} is {side}; "
                f"lower max_image_size to {side * patch} or raise {flag} to {needed}"
            )
