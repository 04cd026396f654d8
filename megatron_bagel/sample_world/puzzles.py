# SPDX-License-Identifier: Apache-2.0
"""Puzzles of the sample world: a question in words, a thought that answers it, and the picture of the thought, in one interleaved sample.

A question describes a scene and says what changes: "a red circle at the top on a black background: make it blue". The thought is the
caption of the scene after the change. It must be read from the question, and the picture from the thought.

    interleaved/rows.jsonl, interleaved/images/N.png      rows of the form think_then_draw
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_bagel.sample_world.text import captions, position_phrase
from megatron_bagel.sample_world.world import Scene, Shape, World, pick


@dataclass(frozen=True)
class Puzzle:
    """A question about one shape, the thought that answers it, and the scene to draw."""

    question: str
    thought: str
    scene: Scene


def draw_puzzle(scene: Scene, world: World, rng: np.random.Generator) -> Puzzle:
    """Draw a question whose answer is ``scene``: one attribute of its only shape, or its background, was another one before.

    The colour or shape of before makes no held-out pair.
    """
    (shape,) = scene.shapes
    colours = [c for c in world.colours if c != shape.colour and (c, shape.shape) not in world.held_out]
    kinds = [s for s in world.shapes if s != shape.shape and (shape.colour, s) not in world.held_out]
    positions = [position for position in world.positions if position != shape.position]
    backgrounds = [background for background in world.backgrounds if background != scene.background]
    options: list[tuple[str, Scene]] = []
    if colours:
        options.append((f"make it {shape.colour}", _with(scene, replace(shape, colour=pick(rng, colours)))))
    if kinds:
        options.append((f"turn it into a {shape.shape}", _with(scene, replace(shape, shape=pick(rng, kinds)))))
    if positions:
        options.append((f"put it {position_phrase(shape.position)}", _with(scene, replace(shape, position=pick(rng, positions)))))
    if backgrounds:
        options.append((f"make the background {scene.background}", replace(scene, background=pick(rng, backgrounds))))
    if not options:
        raise ValueError("a puzzle needs a world with two colours, shapes, positions or backgrounds")
    change, before = pick(rng, options)
    return Puzzle(f"{captions(before, world)[0]}: {change}", captions(scene, world)[0], scene)


def _with(scene: Scene, shape: Shape) -> Scene:
    return replace(scene, shapes=(shape,))
