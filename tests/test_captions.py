from dataclasses import replace

import numpy as np
import pytest

from minunclip.data.captions import LEVELS, caption, compare, describes, parse
from minunclip.data.render import render
from minunclip.data.scenes import COLOURS, SHAPES, TEXTURES, Scene, Thing, edit, is_held_out, sample_scenes


def thing(**changes) -> Thing:
    plain = Thing("circle", "red", "plain", "large", 0.5, 0.27, 0.22, 0.0, (0.0, 0.0, 0.0))
    return replace(plain, **changes)


def test_32_of_320_combinations_are_held_out_and_never_in_training() -> None:
    combinations = [(t, c, s) for t in TEXTURES for c in COLOURS for s in SHAPES if is_held_out(t, c, s)]
    assert len(combinations) == 32 and ("striped", "purple", "star") in combinations
    for held_out in (False, True):
        for scene in sample_scenes(400, 5, held_out):
            assert any(is_held_out(t.texture, t.colour, t.shape) for t in scene.things) == held_out


@pytest.mark.parametrize("held_out", [False, True])
def test_captions_are_true_and_read_back_whole(held_out: bool) -> None:
    rng = np.random.default_rng(0)
    for scene in sample_scenes(300, 1, held_out):
        for level in LEVELS:
            text = caption(scene, level, rng, name_held_out=held_out)
            assert parse(text).unknown == () and describes(text, scene), text
            if held_out:
                assert any(t.texture and t.colour and t.shape and is_held_out(t.texture, t.colour, t.shape) for t in parse(text).things), text


def test_a_full_caption_is_false_once_an_attribute_changes() -> None:
    rng = np.random.default_rng(0)
    for scene in sample_scenes(200, 2):
        text, first = caption(scene, "full", rng), scene.things[0]
        if len(scene.things) == 1:
            assert not describes(text, edit(scene, colour="red" if first.colour != "red" else "blue"))
            assert not describes(text, edit(scene, texture="plain" if first.texture != "plain" else "dotted"))
        assert not describes(text, replace(scene, background="mint" if scene.background != "mint" else "grey"))


def test_comparison_by_hand() -> None:
    scene = Scene((thing(), thing(shape="square", colour="blue", y=0.73)), "white", "above")
    assert describes("a red circle above a blue square", scene) and describes("a blue box under a scarlet disc", scene)
    assert not describes("a red circle below a blue square", scene)
    report = compare(parse("a blue circle above a red square on a white background"), scene)
    assert report.asked == {"shape": 2, "colour": 2, "relation": 1, "background": 1} and not report.all_right
    assert compare(parse("three red circles"), scene).right["count"] == 0
    assert describes("a red circle at the top", Scene((thing(),), "white")) and not describes("a red circle at the left", Scene((thing(),), "white"))


@pytest.mark.parametrize("text", ["", "   ", "zwölf elephants 🐘", "inside", "the word", "two", "above and below", "a" * 5000])
def test_odd_captions_are_read_without_error(text: str) -> None:
    parse(text)
    assert "elephants" in parse("two elephants").unknown


def test_one_scene_at_two_sizes_and_in_a_window() -> None:
    scenes = sample_scenes(12, 3)
    large, small = render(scenes, 128).astype(float), render(scenes, 32).astype(float)
    averaged = large.reshape(12, 32, 4, 32, 4, 3).mean(axis=(2, 4))
    assert np.abs(averaged - small).mean() < 2
    window = render(scenes, 32, np.tile([0.25, 0.5, 0.25], (12, 1)))
    assert np.abs(window.astype(float) - large[:, 64:96, 32:64]).max() <= 1


def test_a_circle_has_its_colour_and_area() -> None:
    picture = render([Scene((thing(x=0.5, y=0.5),), "white")], 256)[0]
    assert tuple(picture[128, 128]) == COLOURS["red"] and tuple(picture[0, 0]) == (250, 250, 250)
    assert (picture[:, :, 1] < 140).mean() == pytest.approx(np.pi * 0.22**2, rel=0.01)
