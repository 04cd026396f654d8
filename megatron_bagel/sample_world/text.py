"""What can truly be said about a scene of the sample world: captions, questions with answers, and edits with their result.

Sentences are short and questions plain on purpose: a question that names the shape ("what color is the circle?") would let a
model answer from word statistics, and would teach it which (colour, shape) pairs are held out. In pictures of several
shapes a question names the place instead.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from megatron_bagel.sample_world.world import POSITIONS, Scene, Shape, World, pick

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Edit:
    """One step of an editing example: the instruction (several ways to put it) and the scene after it."""

    kind: str
    instructions: tuple[str, ...]
    after: Scene


def noun(shape: Shape, world: World) -> str:
    """ "red circle", or "large red circle" in a world of several sizes."""
    return f"{shape.size} {shape.colour} {shape.shape}" if len(world.sizes) > 1 else f"{shape.colour} {shape.shape}"


def place(position: str) -> str:
    """The position as it stands in a sentence: "in the top left", "at the top", "in the center"."""
    return f"in the {position}" if " " in position or position == "center" else f"at the {position}"


def captions(scene: Scene, world: World) -> list[str]:
    """Full descriptions of the scene, in several wordings; each names every attribute of every shape."""
    parts = [f"a {noun(shape, world)} {place(shape.position)}" for shape in scene.shapes]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return [f"{listed} on a {scene.background} background", f"a picture of {listed}, the background is {scene.background}"]


def questions(scene: Scene, world: World) -> list[tuple[str, str]]:
    """All (question, answer) pairs about the scene."""
    asked = [("what color is the background?", scene.background), ("how many shapes are there?", NUMBERS[len(scene.shapes)])]
    for shape in scene.shapes:
        it = "it" if world.max_count == 1 else f"the shape {place(shape.position)}"
        asked += [(f"what color is {it}?", shape.colour), (f"what shape is {it}?", shape.shape)]
        if len(world.sizes) > 1:
            asked.append((f"is {it} small or large?", shape.size))
    if world.max_count == 1:
        asked.append(("where is it?", place(scene.shapes[0].position)))
    return asked


def draw_edit(scene: Scene, world: World, rng: np.random.Generator, kinds: tuple[str, ...] | None = None) -> Edit:
    """A random edit that changes the scene; `kinds` limits it to some of EDITS. Held-out pairs do not appear in its result.

    Raises ValueError where no edit of these kinds can change any scene of this world.
    """
    wanted = list(kinds or EDITS)
    unknown = [kind for kind in wanted if kind not in EDITS]
    if unknown:
        raise ValueError(f"unknown kind of edit {', '.join(unknown)}; the sample world has {', '.join(EDITS)}")
    for kind in (wanted[i] for i in rng.permutation(len(wanted))):
        edit = EDITS[kind](scene, world, rng)
        if edit is not None:
            return edit
    raise ValueError(f"no edit of kind {', '.join(wanted)} changes a scene of this world: give it more colours, shapes, "
                     f"backgrounds or positions")  # fmt: skip


def _changed(scene: Scene, old: Shape, new: Shape) -> Scene:
    shapes = [new if shape is old else shape for shape in scene.shapes]
    return replace(scene, shapes=tuple(sorted(shapes, key=lambda shape: POSITIONS.index(shape.position))))


def _it(scene: Scene, shape: Shape) -> str:
    return "it" if len(scene.shapes) == 1 else f"the shape {place(shape.position)}"


def _recolour(scene: Scene, world: World, rng: np.random.Generator) -> Edit | None:
    shape = pick(rng, scene.shapes)
    others = [c for c, s in world.pairs() if s == shape.shape and c != shape.colour]
    if not others:
        return None
    colour, it = pick(rng, others), _it(scene, shape)
    words = (f"make {it} {colour}", f"change the color of {it} to {colour}")
    return Edit("recolour", words, _changed(scene, shape, replace(shape, colour=colour)))


def _reshape(scene: Scene, world: World, rng: np.random.Generator) -> Edit | None:
    shape = pick(rng, scene.shapes)
    others = [s for c, s in world.pairs() if c == shape.colour and s != shape.shape]
    if not others:
        return None
    kind, it = pick(rng, others), _it(scene, shape)
    words = (f"turn {it} into a {kind}", f"make {it} a {kind}")
    return Edit("reshape", words, _changed(scene, shape, replace(shape, shape=kind)))


def _move(scene: Scene, world: World, rng: np.random.Generator) -> Edit | None:
    shape = pick(rng, scene.shapes)
    taken = {other.position for other in scene.shapes}
    free = [p for p in world.positions if p not in taken]
    if not free:
        return None
    position, it = pick(rng, free), _it(scene, shape)
    words = (f"move {it} to the {position}", f"put {it} {place(position)}")
    return Edit("move", words, _changed(scene, shape, replace(shape, position=position)))


def _background(scene: Scene, world: World, rng: np.random.Generator) -> Edit | None:
    others = [b for b in world.backgrounds if b != scene.background]
    if not others:
        return None
    background = pick(rng, others)
    words = (f"make the background {background}", f"change the background to {background}")
    return Edit("background", words, replace(scene, background=background))


EDITS: dict[str, Callable[[Scene, World, np.random.Generator], Edit | None]] = {
    "recolour": _recolour,
    "reshape": _reshape,
    "move": _move,
    "background": _background,
}
