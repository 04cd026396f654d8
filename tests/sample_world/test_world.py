# SPDX-License-Identifier: Apache-2.0
"""The sample world draws what it says, says what it draws, and the scorer reads it back."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_bagel.data.keyed_random import keyed_generator
from megatron_bagel.sample_world.score import read_single
from megatron_bagel.sample_world.text import EDITS, captions, draw_edit, questions
from megatron_bagel.sample_world.tokenizer_training import SPECIAL_TOKENS, train_tokenizer
from megatron_bagel.sample_world.world import (
    BACKGROUNDS,
    COLOURS,
    NEW_COLOURS,
    POSITIONS,
    SHAPES,
    Shape,
    World,
    centre,
    draw_scene,
    parse_pairs,
    render,
)

FIRST = World()
CROWDED = World(max_count=4, sizes=("small", "large"), picture_sizes=((64, 64), (96, 64)))


@pytest.mark.parametrize("noise", [0, 15])
def test_scorer_reads_noisy_renders(noise: int) -> None:
    """At least 99.5 % of single-shape pictures are read right in every attribute."""
    rng = np.random.default_rng(0)
    scenes = [draw_scene(FIRST, rng) for _ in range(200)]
    right = 0
    for scene in scenes:
        reading = read_single(np.clip(render(scene) + rng.normal(0, noise, (64, 64, 3)), 0, 255).astype(np.uint8))
        right += reading.shape == scene.shapes[0] and reading.background == scene.background
    assert right >= 0.995 * len(scenes)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_scenes_of_several_shapes_are_read_back(seed: int) -> None:
    scene = draw_scene(CROWDED, keyed_generator(seed, "scene"))
    pixels = render(scene)
    assert pixels.shape == (scene.height, scene.width, 3) and pixels.dtype == np.uint8
    background = read_single(pixels).background
    assert background == scene.background
    assert _shapes(pixels, background) == scene.shapes


def _shapes(pixels: np.ndarray, background: str) -> tuple[Shape, ...]:
    """Read each cell of the 3 x 3 grid alone, with the background around it."""
    height, width = pixels.shape[:2]
    shapes = []
    for position in POSITIONS:
        x, y = centre(position, width, height)
        rows = slice(round(y - height / 6), round(y + height / 6))
        columns = slice(round(x - width / 6), round(x + width / 6))
        cell = np.empty_like(pixels)
        cell[:] = BACKGROUNDS[background]
        cell[rows, columns] = pixels[rows, columns]
        shapes.append(read_single(cell, CROWDED.sizes).shape)
    return tuple(shape for shape in shapes if shape is not None)


def test_scorer_finds_no_shape_in_an_empty_picture() -> None:
    reading = read_single(np.full((64, 64, 3), 128, dtype=np.uint8))
    assert reading.shape is None and reading.background == "gray"


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_captions_and_answers_are_true(seed: int) -> None:
    scene = draw_scene(FIRST, keyed_generator(seed, "scene"))
    shape = scene.shapes[0]
    for caption in captions(scene, FIRST):
        for words in (f"{shape.colour} {shape.shape}", shape.position, scene.background):
            assert words in caption
    answers = dict(questions(scene, FIRST))
    assert answers["what color is it?"] == shape.colour
    assert answers["what shape is it?"] == shape.shape
    assert shape.position in answers["where is it?"]
    assert answers["what color is the background?"] == scene.background
    assert answers["how many shapes are there?"] == "one"
    assert questions(scene, FIRST, ("position", "colour")) == [
        pair for pair in answers.items() if pair[0] in ("what color is it?", "where is it?")
    ]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(list(EDITS)))
def test_edit_changes_one_thing_and_names_it(seed: int, kind: str) -> None:
    rng = keyed_generator(seed, "edit")
    scene = draw_scene(FIRST, rng)
    edit = draw_edit(scene, FIRST, rng, (kind,))
    before, after = scene.shapes[0], edit.after.shapes[0]
    pairs = [(before.colour, after.colour), (before.shape, after.shape), (before.position, after.position),
             (scene.background, edit.after.background)]  # fmt: skip
    changed = [new for old, new in pairs if old != new]
    assert len(changed) == 1
    assert all(changed[0] in words for words in edit.instructions)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_recolouring_all_keeps_everything_but_the_colour(seed: int) -> None:
    world = World(held_out=parse_pairs(["red:square", "green:circle"]), max_count=9)
    rng = keyed_generator(seed, "edit")
    scene = draw_scene(world, rng)
    after = draw_edit(scene, world, rng, ("recolour-all",)).after
    (colour,) = {shape.colour for shape in after.shapes}
    assert after == replace(scene, shapes=tuple(replace(shape, colour=colour) for shape in scene.shapes)) != scene
    assert not {(shape.colour, shape.shape) for shape in after.shapes} & world.held_out


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_held_out_pairs_never_appear(seed: int) -> None:
    held_out = parse_pairs([f"{colour}:{SHAPES[i % 4]}" for i, colour in enumerate(COLOURS)])
    world = World(held_out=held_out, max_count=3)
    rng = keyed_generator(seed, "held out")
    scene = draw_scene(world, rng)
    for shown in (scene, draw_edit(scene, world, rng).after):
        assert not {(shape.colour, shape.shape) for shape in shown.shapes} & held_out
        places = [POSITIONS.index(shape.position) for shape in shown.shapes]
        assert places == sorted(set(places))


@pytest.mark.parametrize(
    ("settings_of_world", "said"),
    [
        ({"shapes": ("blob",)}, "blob"),
        ({"colours": ()}, "colours"),
        ({"max_count": 10}, "1 to 9"),
        ({"picture_sizes": ((16, 16),)}, "16x16"),
        ({"colours": ("red",), "shapes": ("cross",), "held_out": frozenset({("red", "cross")})}, "held out"),
    ],
)
def test_impossible_worlds_are_refused(settings_of_world: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        World(**settings_of_world)


def test_bad_held_out_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="mauve:circle"):
        parse_pairs(["mauve:circle"])


def test_tokenizer_is_qwen2s_in_kind(tmp_path) -> None:
    rng = np.random.default_rng(0)
    texts = [text for _ in range(100) for text in captions(draw_scene(FIRST, rng), FIRST)]
    size = train_tokenizer(texts, tmp_path, vocab_size=400)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == size <= 400
    assert "Qwen2" in type(tokenizer).__name__
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(size - len(SPECIAL_TOKENS), size))
    for text in (texts[0], "a  b\n\nc's 123, h\u00e9llo!"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" red circle")) == 2
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


def test_too_small_vocabulary_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="270"):
        train_tokenizer(["a"], tmp_path, vocab_size=100)


@pytest.mark.parametrize("colour", NEW_COLOURS)
def test_a_new_colour_is_drawn_and_read_where_it_is_named_alone(colour):
    assert colour not in World().colours and not set(NEW_COLOURS) & set(COLOURS)
    world = World(colours=(colour,))
    for number in range(12):
        scene = draw_scene(world, np.random.default_rng(number))
        picture = render(scene)
        assert read_single(picture, colours=(*COLOURS, colour)).shape == scene.shapes[0]
        assert read_single(picture).shape.colour in COLOURS
