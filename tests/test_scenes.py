import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunclip.data.captions import caption, describes
from minunclip.data.scenes import COLOURS, OPPOSITE, POSITIONS, SHAPES, SIZES, TEXTURES, Thing, edit, holds, is_held_out, sample_scenes, twin

TRAINING, HELD_OUT = sample_scenes(1500, seed=0), sample_scenes(600, seed=0, held_out=True)


def new(scene) -> list[bool]:
    return [is_held_out(t.texture, t.colour, t.shape) for t in scene.things]


def test_a_tenth_of_the_combinations_is_held_out() -> None:
    out = [c for c in itertools.product(TEXTURES, COLOURS, SHAPES) if is_held_out(*c)]
    assert len(out) == 32 and ("striped", "purple", "star") in out
    assert {(texture, shape) for texture, _, shape in out} == set(itertools.product(TEXTURES, SHAPES))  # one colour for each


def test_every_word_of_a_held_out_combination_is_learned_in_others() -> None:
    seen = {(t.texture, t.colour, t.shape) for scene in sample_scenes(6000, seed=5) for t in scene.things}
    assert seen == {c for c in itertools.product(TEXTURES, COLOURS, SHAPES) if not is_held_out(*c)}


def test_the_splits_share_no_scene() -> None:
    assert not any(any(new(scene)) for scene in TRAINING)
    assert all(any(new(scene)) for scene in HELD_OUT)


def test_the_same_seed_gives_the_same_scenes() -> None:
    assert sample_scenes(50, seed=0) == TRAINING[:50] and sample_scenes(50, seed=0, held_out=True) == HELD_OUT[:50]
    assert sample_scenes(50, seed=1) != TRAINING[:50]


@pytest.mark.parametrize("scenes", [TRAINING, HELD_OUT], ids=["training", "held out"])
def test_scenes_are_as_they_say(scenes) -> None:
    assert {len(scene.things) for scene in scenes} == {1, 2, 3}
    for scene in scenes:
        first = scene.things[0]
        if scene.relation:
            assert len(scene.things) == 2 and holds(scene.relation, *scene.things)
            if scene.relation in OPPOSITE:
                assert holds(OPPOSITE[scene.relation], *scene.things[::-1])
        else:
            assert {(t.shape, t.colour, t.texture, t.size) for t in scene.things} == {(first.shape, first.colour, first.texture, first.size)}
        for thing in scene.things:  # in the picture, but for the tips of a few
            assert all(thing.radius - 0.09 <= c <= 1.09 - thing.radius for c in (thing.x, thing.y))
        for a, b in itertools.combinations(scene.things, 2):
            distance = math.hypot(a.x - b.x, a.y - b.y)
            assert distance + a.radius < b.radius if scene.relation == "inside" else distance > a.radius


def test_every_size_background_and_relation_occurs() -> None:
    assert {t.size for s in TRAINING for t in s.things} == set(SIZES)
    assert {s.relation for s in TRAINING} == {None, "inside", *OPPOSITE}
    assert {s.things[0].position for s in TRAINING if len(s.things) == 1} == set(POSITIONS)


place = st.floats(0.2, 0.8)


@given(place, place, place, place)
def test_at_most_one_relation_holds(x: float, y: float, other_x: float, other_y: float) -> None:
    first, second = (Thing("star", "red", "plain", "large", *centre, 0.2, 0.0, (0.0, 0.0, 0.0)) for centre in ((x, y), (other_x, other_y)))
    true = [r for r in OPPOSITE if holds(r, first, second)]
    assert len(true) == int(math.hypot(x - other_x, y - other_y) >= 0.16)
    if true and abs(abs(x - other_x) - abs(y - other_y)) > 1e-9:
        assert holds(OPPOSITE[true[0]], second, first)


def test_edit_changes_the_first_thing_alone() -> None:
    scene = next(s for s in TRAINING if s.relation)
    changed = edit(scene, colour="blue", size="small")
    assert (changed.things[0].colour, changed.things[0].size) == ("blue", "small")
    assert changed.things[1:] == scene.things[1:] and edit(changed, colour=scene.things[0].colour, size=scene.things[0].size) == scene
    assert np.allclose(changed.things[0].shade, scene.things[0].shade)


def test_a_twin_is_another_scene_that_the_full_caption_is_not_true_of() -> None:
    rng = np.random.default_rng(3)
    for scene in TRAINING[:1500]:
        other = twin(scene, rng)
        assert (other.background, other.word, len(other.things)) == (scene.background, scene.word, len(scene.things))
        assert not any(is_held_out(t.texture, t.colour, t.shape) for t in other.things)
        assert describes(caption(scene, "full", rng), scene) and not describes(caption(scene, "full", rng), other)
        if other.relation:
            assert holds(other.relation, *other.things)
        else:
            assert len({(t.shape, t.colour, t.texture, t.size) for t in other.things}) == 1
    changed = {scene.relation == twin(scene, rng).relation for scene in TRAINING if scene.relation in OPPOSITE}
    assert changed == {True, False}
