import math
from dataclasses import replace

import numpy as np
import pytest
from einops import reduce

from minunclip.data.render import render
from minunclip.data.scenes import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, Scene, Thing, sample_scenes

SCENES = sample_scenes(16, seed=3) + sample_scenes(16, seed=3, held_out=True)


def alone(shape: str = "circle", texture: str = "plain", **changes) -> Scene:
    return Scene((replace(Thing(shape, "blue", texture, "large", 0.5, 0.5, 0.22, 0.0, (0.0, 0.0, 0.0)), **changes),), "beige")


@pytest.mark.parametrize("size", [1, 16, 33])
def test_shape_and_type(size: int) -> None:
    pictures = render(SCENES[:5], size)
    assert pictures.shape == (5, size, size, 3) and pictures.dtype == np.uint8
    assert render([], size).shape == (0, size, size, 3)


def test_a_scene_is_the_same_picture_at_every_size() -> None:
    small, large = render(SCENES, 32).astype(float), render(SCENES, 128).astype(float)
    difference = np.abs(small - reduce(large, "b (h i) (w j) c -> b h w c", "mean", i=4, j=4)).mean(axis=(1, 2, 3))
    assert difference.mean() < 1 and difference.max() < 4  # of 255


def test_a_window_is_a_cut_of_the_whole() -> None:
    windows = np.array([[0.25, 0.5, 0.25]] * 16)
    cut = render(SCENES[8:24], 128)[:, 64:96, 32:64]
    assert np.abs(cut.astype(int) - render(SCENES[8:24], 32, windows)).max() <= 1


def test_a_picture_does_not_depend_on_its_batch() -> None:
    together = render(SCENES, 32)
    assert (render(SCENES[::-1], 32)[::-1] == together).all()
    assert all((render([scene], 32)[0] == picture).all() for scene, picture in zip(SCENES[:20], together))


@pytest.mark.parametrize("size", [32, 128])
def test_a_plain_circle_has_its_area_place_and_colour(size: int) -> None:
    picture = render([alone(x=0.4, y=0.6)], size)[0].astype(float)
    paper, paint = np.array(BACKGROUNDS["beige"]), np.array(COLOURS["blue"])
    cover = ((picture - paper) @ (paint - paper)) / np.sum((paint - paper) ** 2)
    assert cover.mean() == pytest.approx(math.pi * 0.22**2, rel=0.01)
    place = (np.arange(size) + 0.5) / size
    assert (cover.sum(axis=0) @ place / cover.sum(), cover.sum(axis=1) @ place / cover.sum()) == pytest.approx((0.4, 0.6), abs=0.002)
    assert (picture[int(0.6 * size), int(0.4 * size)] == paint).all()


def test_a_shade_is_added_to_the_colour() -> None:
    picture = render([alone(shade=(5.0, -7.0, 9.0))], 32)[0]
    assert picture[16, 16].tolist() == [c + s for c, s in zip(COLOURS["blue"], (5, -7, 9))]


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_background_is_exact_all_around(shape: str, background: str) -> None:
    picture = render([replace(alone(shape), background=background)], 64)[0]
    rim = np.concatenate([picture[:8].reshape(-1, 3), picture[-8:].reshape(-1, 3), picture[:, :8].reshape(-1, 3), picture[:, -8:].reshape(-1, 3)])
    assert (rim == BACKGROUNDS[background]).all()
    assert (picture != BACKGROUNDS[background]).any()


def test_every_shape_and_texture_looks_different() -> None:
    pictures = render([alone(shape, texture) for shape in SHAPES for texture in TEXTURES], 64).astype(float)
    apart = np.abs(pictures[:, None] - pictures[None]).mean(axis=(2, 3, 4)) + 1e9 * np.eye(len(pictures))
    assert apart.min() > 1


def test_textures_lighten_about_half_and_never_leak() -> None:
    plain, *textured = render([alone("square", texture) for texture in ("plain", "striped", "dotted", "checkered")], 128).astype(float)
    outside = (plain == BACKGROUNDS["beige"]).all(axis=-1)
    for picture in textured:
        assert (picture[outside] == BACKGROUNDS["beige"]).all() and (picture[~outside] >= plain[~outside] - 1).all(axis=-1).mean() > 0.97
        assert 0.15 < (picture[~outside] > plain[~outside] + 40).any(axis=-1).mean() < 0.6


def test_what_is_inside_lies_on_top() -> None:
    outer = replace(alone("square").things[0], radius=0.34, colour="yellow")
    inner = replace(alone().things[0], radius=0.15)
    picture = render([Scene((inner, outer), "white", "inside")], 64)[0]
    assert (picture[32, 32] == COLOURS["blue"]).all() and (picture[32, 48] == COLOURS["yellow"]).all()


@pytest.mark.parametrize("on_thing", [True, False])
def test_a_word_is_written_on_a_white_label(on_thing: bool) -> None:
    plain = alone(y=0.5 if on_thing else 0.36)
    bare, star, heart = render([replace(plain, word=word, word_on_thing=on_thing) for word in (None, "star", "heart")], 128)
    changed = np.argwhere((bare != star).any(axis=-1))
    (top, left), (bottom, right) = changed.min(axis=0) / 128, (changed.max(axis=0) + 1) / 128
    middle = 0.5 if on_thing else 0.36 + 1.25 * 0.22 + 0.17 / 2
    assert (top + bottom) / 2 == pytest.approx(middle, abs=0.01) and bottom - top == pytest.approx(0.17, abs=0.02)
    assert (left + right) / 2 == pytest.approx(0.5, abs=0.01)
    label = star[round(top * 128) + 1 : round(bottom * 128) - 1, round(left * 128) + 1 : round(right * 128) - 1].astype(int)
    assert label.max() == 255 and label.min() < 40 and np.ptp(label, axis=-1).max() == 0  # black ink on white paper
    assert (star != heart).any()
