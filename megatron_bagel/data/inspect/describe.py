# SPDX-License-Identifier: Apache-2.0
"""Describes an index, a sample or a pack in words: the texts of the inspector (figures.py draws the pictures)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from megatron_bagel.data.index.format import PLANNING_SCHEMA, Manifest
from megatron_bagel.data.index.reader import DatasetReader
from megatron_bagel.data.planner.assign import PackPlan
from megatron_bagel.data.sources.dataset_config import INTERLEAVED, TEXT, VLM
from megatron_bagel.data.sources.records import ANSWER_ITEM, IMAGE_ITEM, Record
from megatron_bagel.data.sources.stored_items import LOSS, NEVER, NEXT_TOKENS, ROLES, VAE, VIT, StoredItem, own_probability, stored_items
from megatron_bagel.data.sources.stored_items import TEXT as TEXT_KIND
from megatron_bagel.data.sources.stored_videos import VIDEO_ITEM, conversation_items
from megatron_bagel.data.tokenizer import Tokenizer
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.pack import Pack

COLUMNS = (("text_tokens", "tokens per text"), ("width", "image width"), ("height", "image height"))
_BAR = 40  # characters of the longest bar
_BINS = 32  # powers of two: an int32 column needs no more


@dataclass(frozen=True)
class Histogram:
    """Counts of a column's values: bin k holds values in [2^(k-1), 2^k), bin 0 the zeros. It is built shard by shard, for any size."""

    counts: np.ndarray
    total: int
    largest: int

    @classmethod
    def of(cls, parts: Iterable[np.ndarray]) -> Histogram:
        """Count the values of ``parts``, arrays of whole numbers of at least 0."""
        counts, total, largest = np.zeros(_BINS, dtype=np.int64), 0, 0
        for values in parts:
            exponents = np.frexp(values.astype(np.float64))[1] if len(values) else np.empty(0, dtype=np.int64)
            counts += np.bincount(exponents, minlength=_BINS)[:_BINS]
            total, largest = total + int(values.sum(dtype=np.int64)), max(largest, int(values.max(initial=0)))
        return cls(counts, total, largest)

    @property
    def values(self) -> int:
        """Return the number of values."""
        return int(self.counts.sum())

    def bins(self) -> list[tuple[int, int, int]]:
        """Return (smallest, largest value, count) of the bins from the first to the last non-empty one."""
        filled = np.flatnonzero(self.counts)
        span = range(filled[0], filled[-1] + 1) if len(filled) else ()
        return [(2 ** (k - 1) if k else 0, 2**k - 1 if k else 0, int(self.counts[k])) for k in span]

    def lines(self, title: str) -> list[str]:
        """Return a bar chart made of characters."""
        if not self.values:
            return []
        lines = [f"  {title}: {self.values} values, mean {self.total / self.values:.1f}, largest {self.largest}"]
        largest_count = int(self.counts.max())
        for low, high, count in self.bins():
            lines.append(f"    {low:>6} to {high:<6} {'#' * -(-_BAR * count // largest_count):<{_BAR}} {count}")
        return lines


def describe_schema(manifest: Manifest) -> str:
    """Return versions, tokenizer and planning columns."""
    columns = ", ".join(f"{field.name} ({field.type})" for field in PLANNING_SCHEMA)
    return (
        f"schema {manifest.schema_version}, tokenizer {manifest.tokenizer_path} ({manifest.vocabulary_size} tokens, "
        f"fingerprint {manifest.tokenizer_fingerprint[:12]})\nEXIF orientation: {manifest.exif}\ncolumns: {columns}"
    )


def histograms(reader: DatasetReader) -> dict[str, Histogram]:
    """Return a histogram of every column of ``COLUMNS`` by its title."""
    return {title: Histogram.of(getattr(shard, column).values for shard in reader.shards()) for column, title in COLUMNS}


def describe_dataset(reader: DatasetReader) -> str:
    """Return the counts of a dataset, its text lengths and image sizes."""
    info = reader.info
    size = sum(bytes_ for shard in info.shards for bytes_, _ in shard.files.values())
    lines = [
        f"{reader.name}: {len(reader)} samples in {len(info.shards)} shard(s) of {size / 1e6:.1f} MB together, "
        f"{len(info.sources)} source file(s) of {sum(source.rows for source in info.sources)} rows"
    ]
    for title, histogram in histograms(reader).items():
        lines += histogram.lines(title)
    lines += [f"  skipped {count}: {reason}" for reason, count in info.skipped.items()]
    return "\n".join(lines)


def describe_sample(reader: DatasetReader, index: int, tokenizer: Tokenizer) -> str:
    """Return source, texts and image sizes of one sample, in order."""
    record, (path, row) = reader.record(index), reader.source(index)
    lines = [f"{reader.name} sample {index}: {path}, row {row}"]
    if record.group == INTERLEAVED:
        return "\n".join([*lines, *_item_lines(reader, index, record, tokenizer)])
    lines += [f"  image {i}: {w} x {h}" for i, (w, h) in enumerate(zip(record.widths, record.heights, strict=True))]
    found = list(conversation_items(record.structure)) if record.group in (VLM, TEXT) else []
    lines += [f"  a video of {frames} frames, {fps:g} per second" for code, frames, fps in found if code == VIDEO_ITEM]
    turns = [code for code, _, _ in found if code not in (IMAGE_ITEM, VIDEO_ITEM)]
    for i, count in enumerate(record.text_tokens):
        learned = " (learned)" if turns and turns[i] == ANSWER_ITEM else ""
        lines.append(f"  text {i}{learned}, {count} tokens: {tokenizer.decode(reader.text_ids(index, i).tolist())!r}")
    return "\n".join(lines)


def _item_lines(reader: DatasetReader, index: int, record: Record, tokenizer: Tokenizer) -> list[str]:
    """Return a line for every item of an interleaved sample, and one for every further alternative and frame."""
    lines, text, image = [], 0, 0
    for number, item in enumerate(stored_items(record.structure)):
        if item.kind == TEXT_KIND:
            words = [tokenizer.decode(reader.text_ids(index, text + i).tolist()) for i in range(item.count)]
            contents = [f"{record.text_tokens[text + i]} tokens: {word!r}" for i, word in enumerate(words)]
            text += item.count
        else:
            contents = [f"image {image + i}: {record.widths[image + i]} x {record.heights[image + i]}" for i in range(item.count)]
            image += item.count
        lines.append(f"  item {number}{marks_of(item)}, {contents[0]}")
        lines += [f"    or {content}" if item.kind == TEXT_KIND else f"    then {content}" for content in contents[1:]]
    return lines


def marks_of(item: StoredItem) -> str:
    """Return what is done with an item, in brackets: role, losses, conditions, dropout, and what it predicts at its end."""
    marks = [ROLES[item.role]] if item.role else []
    if item.has(LOSS):
        marks.append("learned" if item.kind == TEXT_KIND else "drawn")
    conditions = [name for flag, name in ((VAE, "vae"), (VIT, "vit")) if item.has(flag)]
    marks += [f"condition {' and '.join(conditions)}"] if conditions else []
    for code, name in ((item.drop, "droppable" if item.kind == TEXT_KIND else "vae droppable"), (item.drop_vit, "vit droppable")):
        probability = own_probability(code)
        marks += [] if code == NEVER else [name if probability is None else f"{name} with {probability:g}"]
    marks += [f"then {NEXT_TOKENS[item.next_token - 1]}"] if item.next_token else []
    return f" ({', '.join(marks)})" if marks else ""


def describe_pack(plan: PackPlan, pack: Pack, capacity: int) -> str:
    """Return fill, tokens by expert, losses and mask area of a pack, and its samples with their items."""
    vae, length = len(pack.vae_positions), max(pack.sequence_length, 1)
    area = PackMask.of(pack).area()
    lines = [
        f"pack {plan.number}: {pack.sequence_length} of {capacity} tokens ({pack.sequence_length / capacity:.1%}), cost {plan.cost:.0f}",
        f"  understanding expert {pack.sequence_length - vae} tokens ({len(pack.vit_positions)} ViT), generation expert {vae}",
        f"  learned: {len(pack.ce_positions)} text tokens, {len(pack.mse_positions)} latent tokens",
        f"  attention: {area} pairs, {area / length**2:.1%} of the square; {len(pack.sample_lens)} samples, {len(pack.split_lens)} splits",
    ]
    for sample in pack.samples:
        items = []
        for item in sample.items:
            description = f"text {len(item.token_ids)}" if item.kind == "text" else f"{item.kind} {item.width}x{item.height}"
            items.append(description + (" learned" if item.loss else "") + (" dropped" if item.dropped else ""))
        lines.append(f"  {sample.dataset} row {sample.index} epoch {sample.epoch}: {', '.join(items)}")
    return "\n".join(lines)
