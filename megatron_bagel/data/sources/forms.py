# SPDX-License-Identifier: Apache-2.0
"""Forms in which people hold interleaved rows, each turned into the list of items of interleaved.py (samples in docs/data.md).

A picture in a row is a file name, bytes or {bytes, path}. In rows in which something is drawn, what the user gives is droppable, as in the
original's editing data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from megatron_bagel.data.sources.parse import IMAGE_MARK
from megatron_bagel.data.sources.records import BadRow

Items = list[dict[str, Any]]
Form = Callable[[Mapping[str, Any]], Items]
_MARK = re.compile(r"<image_start>\s*\[(\w+)\]\s*<image_end>")


def _items(row: Mapping[str, Any]) -> Items:
    return row.get("items")  # type: ignore[return-value]  # parse_items checks it


def _conversations(row: Mapping[str, Any]) -> Items:
    """Turns (``from``/``value`` or ``role``/``content``) whose ``<image>`` marks stand for the pictures of ``image`` in order.

    A picture in an answer is drawn. In a row without one the vision tower alone reads the pictures, as in ``vlm_sft``.
    """
    turns = row.get("conversations") or row.get("messages")
    if not isinstance(turns, list) or not turns:
        raise BadRow("conversations is missing or empty")
    spoken = [_turn(turn, number) for number, turn in enumerate(turns)]
    images = iter(_listed(row.get("image") or row.get("images")))
    is_drawn = any(role == "assistant" and IMAGE_MARK in text for role, text in spoken)
    items: Items = []
    for role, text in spoken:
        for number, piece in enumerate(text.split(IMAGE_MARK)):
            if number:
                image = next(images, None)
                if image is None:
                    raise BadRow(f"{sum(text.count(IMAGE_MARK) for _, text in spoken)} {IMAGE_MARK} marks are more than the images")
                items.append({"image": image, "role": role, **({} if is_drawn else {"condition": ["vit"]})})
            if piece.strip():
                items.append({"text": piece.strip() if IMAGE_MARK in text else piece, "role": role})
    return _with_droppable(items) if is_drawn else items


_TURN_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _turn(turn: Any, number: int) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise BadRow(f"turn {number} of the conversation is no object")
    speaker, text = turn.get("from") or turn.get("role"), turn.get("value") or turn.get("content")
    if speaker not in _TURN_ROLES:
        raise BadRow(f"turn {number} is from {speaker!r}; known are {', '.join(_TURN_ROLES)}")
    if not isinstance(text, str):
        raise BadRow(f"turn {number} has no text in 'value' or 'content'")
    return _TURN_ROLES[speaker], text


def _thinkmorph(row: Mapping[str, Any]) -> Items:
    """A question, and an answer in which thoughts and pictures alternate.

    Two forms: numbered columns (``problem_image_0``, ``question``, ``resoning_thought_0``, ``reasoning_image_0``, ..., ``answer``), and
    the lists ``image_list``, ``instruction_list`` and ``output_text_list``, in which pictures beyond the inputs stand between the texts.
    """
    if "output_text_list" in row:
        inputs, texts, pictures = _strings(row, "instruction_list"), _strings(row, "output_text_list"), _listed(row.get("image_list"))
        shown = len(pictures) - max(len(texts) - 1, 0)
        if shown < 0:
            raise BadRow(f"output_text_list has {len(texts)} texts with a picture between each two, image_list {len(pictures)} pictures")
        questions, given, drawn = inputs, pictures[:shown], pictures[shown:]
    else:
        given, drawn = _numbered(row, "problem_image"), _numbered(row, "reasoning_image")
        thoughts = _numbered(row, "resoning_thought") or _numbered(row, "reasoning_thought")
        questions, texts = [row.get("question")], [f"<think>{thought}</think>" for thought in thoughts]
        if row.get("answer") is not None:
            texts = [*texts[:-1], f"{texts[-1] if texts else ''}<answer>{row['answer']}</answer>"]
    if not texts:
        raise BadRow("no thought and no answer, so nothing to learn from")
    return _with_droppable([*_shown(given), *_said(questions, "user"), *_alternating(texts, drawn)])


def _trace(row: Mapping[str, Any]) -> Items:
    """``question`` with ``images``, ``trace`` (steps with ``text``, ``image`` or both), and ``answer``: UniCoT's planning and checking."""
    steps = row.get("trace")
    if not isinstance(steps, list) or not steps:
        raise BadRow("no list of steps under 'trace'")
    items = [*_shown(_listed(row.get("images", row.get("image")))), *_said([row.get("question")], "user")]
    for number, step in enumerate(steps):
        step = {key: value for key, value in step.items() if value is not None} if isinstance(step, Mapping) else {}
        if not set(step) & {"text", "image"}:
            raise BadRow(f"step {number} of the trace has neither text nor image")
        items += [{key: step[key], "role": "assistant"} for key in ("text", "image") if key in step]
    answer = row.get("answer")
    return _with_droppable(items + (_said([answer], "assistant") if answer else []))


def _marked_trace(row: Mapping[str, Any]) -> Items:
    """``Question``, ``Text Reasoning Trace`` and ``Final Answer`` (Zebra-CoT): ``<image_start>[name]<image_end>`` names a column."""
    question, trace, answer = (row.get(name) for name in ("Question", "Text Reasoning Trace", "Final Answer"))
    if not isinstance(question, str) or not isinstance(trace, str):
        raise BadRow("no text under 'Question' or 'Text Reasoning Trace'")
    items = _marked(question, row, "user") + _marked(trace, row, "assistant")
    return _with_droppable(items + (_said([answer], "assistant") if answer else []))


def _marked(text: str, row: Mapping[str, Any], role: str) -> Items:
    pieces = _MARK.split(text)
    items: Items = []
    for number, piece in enumerate(pieces):
        if number % 2:
            if row.get(piece) is None:
                raise BadRow(f"the text names the picture {piece}, which the row does not have")
            items.append({"image": row[piece], "role": role})
        elif piece.strip():
            items.append({"text": piece.strip(), "role": role})
    return items


def _references(row: Mapping[str, Any]) -> Items:
    """Several reference pictures (``images``) before one ``instruction``, and the ``target`` that it describes."""
    if row.get("target") is None:
        raise BadRow("no picture under 'target'")
    return _with_droppable([*_shown(_listed(row.get("images"))), *_said([row.get("instruction")], "user"), *_drawn([row["target"]])])


def _think_then_draw(row: Mapping[str, Any]) -> Items:
    """A ``prompt``, perhaps with ``images``, the ``thought`` before drawing, and the ``target``."""
    if row.get("target") is None or row.get("thought") is None:
        raise BadRow("no text under 'thought', or no picture under 'target'")
    asked = [*_shown(_listed(row.get("images"))), *_said([row.get("prompt")], "user")]
    return _with_droppable([*asked, *_said([row["thought"]], "assistant"), *_drawn([row["target"]])])


#: Forms of the rows of the group ``interleaved``, by the name that ``format`` in the dataset YAML gives.
FORMS: dict[str, Form] = {
    "items": _items,
    "conversations": _conversations,
    "thinkmorph": _thinkmorph,
    "trace": _trace,
    "marked_trace": _marked_trace,
    "references": _references,
    "think_then_draw": _think_then_draw,
}


def _alternating(texts: list[Any], images: list[Any]) -> Items:
    """Return texts with a picture after each as long as there are pictures."""
    items: Items = []
    for number in range(max(len(texts), len(images))):
        items += _said(texts[number : number + 1], "assistant") + _drawn(images[number : number + 1])
    return items


def _with_droppable(items: Items) -> Items:
    """Mark what the user gives as droppable if a picture is drawn later."""
    if not any("image" in item and item.get("role") == "assistant" for item in items):
        return items
    return [{**item, "droppable": True} if item.get("role") == "user" else item for item in items]


def _shown(images: list[Any]) -> Items:
    return [{"image": image, "role": "user"} for image in images]


def _drawn(images: list[Any]) -> Items:
    return [{"image": image, "role": "assistant"} for image in images]


def _said(texts: list[Any], role: str) -> Items:
    if any(text is None for text in texts):
        raise BadRow(f"no text from the {role}")
    return [{"text": text, "role": role} for text in texts]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _strings(row: Mapping[str, Any], name: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise BadRow(f"column {name} is not a list of strings")
    return value


def _numbered(row: Mapping[str, Any], stem: str) -> list[Any]:
    """Return the values of the columns ``stem_N`` by their numbers."""
    names = [name for name in row if re.fullmatch(rf"{stem}_\d+", name)]
    return [row[name] for name in sorted(names, key=lambda name: int(name.rsplit("_", 1)[1]))]
