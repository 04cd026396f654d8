# SPDX-License-Identifier: Apache-2.0
"""True statements about a scene of the sample world: captions, questions with answers, and edits with their result.

Sentences are short and questions plain on purpose. A question that names the shape ("what color is the circle?") would let a model
answer from word statistics, and would teach it which (colour, shape) pairs are held out. In pictures of several shapes a question
names the position instead.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from megatron_bagel.sample_world.world import POSITIONS, Scene, Shape, World, pick

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Edit:
    """One step of an editing example: the instruction in several wordings, and the scene after it."""

    kind: str
    instructions: tuple[str, ...]
    after: Scene


def noun(shape: Shape, world: World) -> str:
    """Return "red circle", or "large red circle" in a world of several sizes."""
    return f"{shape.size} {shape.colour} {shape.shape}" if len(world.sizes) > 1 else f"{shape.colour} {shape.shape}"


def position_phrase(position: str) -> str:
    """Return the position as a sentence names it: "in the top left", "at the top", "in the center"."""
    return f"in the {position}" if " " in position or position == "center" else f"at the {position}"


def captions(scene: Scene, world: World) -> list[str]:
    """Return full descriptions of the scene in several wordings; each names every attribute of every shape."""
    parts = [f"a {noun(shape, world)} {position_phrase(shape.position)}" for shape in scene.shapes]
    shape_list = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return [f"{shape_list} on a {scene.background} background", f"a picture of {shape_list}, the background is {scene.background}"]


#: What a question may ask for.
QUESTION_KINDS = ("background", "count", "colour", "shape", "size", "position")


def questions(scene: Scene, world: World, kinds: tuple[str, ...] = QUESTION_KINDS) -> list[tuple[str, str]]:
    """Return all (question, answer) pairs of these ``kinds`` about the scene."""
    pairs = [
        ("background", "what color is the background?", scene.background),
        ("count", "how many shapes are there?", NUMBERS[len(scene.shapes)]),
    ]
    for shape in scene.shapes:
        subject = "it" if world.max_count == 1 else f"the shape {position_phrase(shape.position)}"
        pairs += [("colour", f"what color is {subject}?", shape.colour), ("shape", f"what shape is {subject}?", shape.shape)]
        if len(world.sizes) > 1:
            pairs.append(("size", f"is {subject} small or large?", shape.size))
    if world.max_count == 1:
        pairs.append(("position", "where is it?", position_phrase(scene.shapes[0].position)))
    return [(question, answer) for kind, question, answer in pairs if kind in kinds]


def draw_edit(scene: Scene, world: World, rng: np.random.Generator, kinds: tuple[str, ...] | None = None) -> Edit:
    """Draw a random edit that changes the scene, of one of ``kinds``, or of those that change one thing. Its result has no held-out pairs.

    Raises ValueError if no edit of these kinds can change any scene of this world.
    """
    kind_names = list(kinds or SINGLE_EDITS)
    unknown = [kind for kind in kind_names if kind not in EDITS]
    if unknown:
        raise ValueError(f"unknown kind of edit {', '.join(unknown)}; the sample world has {', '.join(EDITS)}")
    for kind in (kind_names[i] for i in rng.permutation(len(kind_names))):
        edit = EDITS[kind](scene, world, rng)
        if edit is not None:
            return edit
    raise ValueError(f"no edit of kind {', '.join(kind_names)} changes a scene of this world: give it more colours, shapes, "
                     f"backgrounds or positions")  # fmt: skip


def _changed(scene: Scene, old_shape: Shape, new_shape: Shape) -> Scene:
    shapes = [new_shape if shape is old_shape else shape for shape in scene.shapes]
    return replace(scene, shapes=tuple(sorted(shapes, key=lambda shape: POSITIONS.index(shape.position))))


def _subject(scene: Scene, shape: Shape) -> str:
    return "it" if len(scene.shapes) == 1 else f"the shape {position_phrase(shape.position)}"


def _recolour(scene: Scene, world: World, rng: np.random.Generator) -> Edit | None:
    shape = pick(rng, scene.shapes)
    other_colours = [c for c, s in world.pairs() if s == shape.shape and c != shape.colour]
    if not other_colours:
        return None
    colour, subject = pick(rng, other_colours), _subject(scene, shape)
    words = (f"make {subject} {colour}", f"change the color of {subject} to {colour}")
    return Edit("recolour", words, _changed(scene, shape, replace(shape, colour=colour)))


def _recolour_all(scene: Scene, world: World, rng: np.random.Generator) -> Edit | None:
    colours = [c for c in world.colours if all((c, shape.shape) not in world.held_out for shape in scene.shapes)]
    other_colours = [c for c in colours if any(c != shape.colour for shape in scene.shapes)]
    if not other_colours:
        return None
    colour, subject = pick(rng, other_colours), "it" if len(scene.shapes) == 1 else "them"
    words = (f"make {subject} {colour}", f"change the color of {subject} to {colour}")
    return Edit("recolour-all", words, replace(scene, shapes=tuple(replace(shape, colour=colour) for shape in scene.shapes)))


def _reshape(scene: Scene, world: World, rng: np.random.Generator) -> Edit | None:
    shape = pick(rng, scene.shapes)
    other_kinds = [s for c, s in world.pairs() if c == shape.colour and s != shape.shape]
    if not other_kinds:
        return None
    kind, subject = pick(rng, other_kinds), _subject(scene, shape)
    words = (f"turn {subject} into a {kind}", f"make {subject} a {kind}")
    return Edit("reshape", words, _changed(scene, shape, replace(shape, shape=kind)))


def _move(scene: Scene, world: World, rng: np.random.Generator) -> Edit | None:
    shape = pick(rng, scene.shapes)
    occupied_positions = {other_shape.position for other_shape in scene.shapes}
    free_positions = [p for p in world.positions if p not in occupied_positions]
    if not free_positions:
        return None
    position, subject = pick(rng, free_positions), _subject(scene, shape)
    words = (f"move {subject} to the {position}", f"put {subject} {position_phrase(position)}")
    return Edit("move", words, _changed(scene, shape, replace(shape, position=position)))


def _background(scene: Scene, world: World, rng: np.random.Generator) -> Edit | None:
    other_backgrounds = [b for b in world.backgrounds if b != scene.background]
    if not other_backgrounds:
        return None
    background = pick(rng, other_backgrounds)
    words = (f"make the background {background}", f"change the background to {background}")
    return Edit("background", words, replace(scene, background=background))


DrawEdit = Callable[[Scene, World, np.random.Generator], Edit | None]
#: Edits of one shape, which pictures of several name by its position, or of the background.
SINGLE_EDITS: dict[str, DrawEdit] = {"recolour": _recolour, "reshape": _reshape, "move": _move, "background": _background}
EDITS: dict[str, DrawEdit] = SINGLE_EDITS | {"recolour-all": _recolour_all}
