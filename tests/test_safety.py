"""Sieves: what they catch, what they must let through, and what a picture still says after an edit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minunclip.data.captions import caption
from minunclip.data.scenes import sample_scenes
from minunclip.safety import (
    copied,
    detect,
    find_terms,
    fit_detector,
    is_signed,
    plain,
    read_facts,
    read_terms,
    save_picture,
    sign,
    total_variation,
)


@pytest.mark.parametrize(
    "dressed",
    [
        *("a heart", "two HEARTS", "a Heart!", "a héàrt", "a h-e-a-r-t", "h e a r t", "h.e.a.r.t", "a h_e_a_r_t", "a h3art", "he4rt", "ｈｅａｒｔ"),
        *("a һeart", "a hеаrt", "a he\u200bart", "he\u00adart", "a h34rts", "α ηeart", "\u2764 heart", "3 hearts", "𝐇𝐄𝐀𝐑𝐓", "ℋeart"),
    ],
)
def test_a_term_is_found_however_it_is_dressed(dressed):
    assert find_terms(dressed, ["square", "heart"]) == ["heart"]


@pytest.mark.parametrize("harmless", ["a hearth", "sweetheart", "a hear t", "the art", "a sheart", "", "!!!", "a b c", "h-e a-r t", "100 % of 3 rings"])
def test_words_that_only_hold_a_term_are_let_through(harmless):
    assert find_terms(harmless, ["heart"]) == []


def test_terms_of_several_words():
    assert find_terms("A Red  Ring!", ["red ring", "ring red", " "]) == ["red ring"]


def test_harmless_captions_of_the_world_pass():
    rng = np.random.default_rng(0)
    scenes = [scene for scene in sample_scenes(400, seed=5) if all(thing.shape != "heart" for thing in scene.things) and scene.word != "heart"]
    assert not [text for scene in scenes if find_terms(text := caption(scene, "full", rng), ["heart"])]


@given(st.text(max_size=40))
def test_plain_text_has_no_capitals_and_single_spaces(text):
    once = plain(text)
    assert once == once.casefold() and once == once.strip() and "  " not in once
    assert find_terms(text, ["zzqx"]) == [] or "z" in once


def test_a_list_of_terms(tmp_path):
    path = tmp_path / "terms.txt"
    path.write_text("# not to be drawn\nheart\n\n  red ring \n", encoding="utf-8-sig")
    assert read_terms(path) == ["heart", "red ring"]
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="names no terms"):
        read_terms(path)
    path.write_bytes(b"\xff\xfeh")
    with pytest.raises(ValueError, match="UTF-8"):
        read_terms(path)
    path.write_text("heart\n\U0001f52b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="'\U0001f52b' has no letter and no figure, and would never be found"):
        read_terms(path)


def test_a_detector_is_the_minimum_of_its_loss_and_tells_clouds_apart():
    generator = torch.Generator().manual_seed(0)
    wanted, others = torch.randn(60, 5, generator=generator) + 1, torch.randn(80, 5, generator=generator) - 1
    weights = fit_detector(wanted, others, penalty=2.0).requires_grad_(True)
    loss = (detect(wanted, weights) - 1).square().sum() + detect(others, weights).square().sum() + 2.0 * weights.square().sum()
    loss.backward()
    assert weights.grad.abs().max() < 1e-3
    with torch.no_grad():
        assert (detect(wanted, weights) > 0.5).float().mean() > 0.9 and (detect(others, weights) > 0.5).float().mean() < 0.1


def test_facts_come_back_from_a_picture_and_are_gone_from_a_copy_without_them(tmp_path):
    picture, facts = np.zeros((8, 8, 3), np.uint8), {"prompt": "ein rotes Herz ❤, \n$x$", "seed": 7}
    save_picture(tmp_path / "ours.png", picture, facts)
    assert read_facts(tmp_path / "ours.png") == {"prompt": facts["prompt"], "seed": "7"}
    Image.open(tmp_path / "ours.png").convert("RGB").save(tmp_path / "ours.jpg")
    assert read_facts(tmp_path / "ours.jpg") == {}


def test_facts_of_what_is_no_picture(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    save_picture(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8), {})
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    for name in ("text.png", "cut.png"):
        with pytest.raises(ValueError, match="no picture"):
            read_facts(tmp_path / name)
    with pytest.raises(ValueError, match="not there"):
        read_facts(tmp_path / "none.png")


@pytest.mark.parametrize("side", [32, 128, 512])
def test_a_signature_is_found_and_only_where_it_is(side):
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    before, signed = picture.copy(), sign(picture)
    assert is_signed(signed) and not is_signed(picture) and np.array_equal(picture, before)
    changed = (signed != picture).any(axis=2)
    assert changed.sum() <= 5 * max(1, side // 64) ** 2 and not changed[: side // 2].any()
    assert not is_signed(signed[::-1]) and not is_signed(signed[:, :-3])


def test_what_a_signature_survives(tmp_path):
    picture = sign(np.full((512, 512, 3), 120, np.uint8))
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=80)
    assert is_signed(np.asarray(Image.open(tmp_path / "a.jpg")))
    assert is_signed(np.asarray(Image.fromarray(picture).resize((256, 256), Image.Resampling.BOX)))


def test_a_copy_is_suspicious_and_a_fresh_picture_is_not():
    generator = torch.Generator().manual_seed(0)
    training, fresh, new = (torch.nn.functional.normalize(torch.randn(n, 16, generator=generator), dim=1) for n in (500, 400, 400))
    copies = torch.nn.functional.normalize(training[:50] + 0.02 * torch.randn(50, 16, generator=generator), dim=1)
    assert copied(copies, training, fresh).all()
    assert copied(new, training, fresh).float().mean() < 0.05


def test_total_variation():
    assert total_variation({"a": 0.5, "b": 0.5}, {"b": 0.5, "a": 0.5}) == 0
    assert total_variation({"a": 1.0}, {"b": 1.0}) == 1
    assert total_variation({"a": 0.75, "b": 0.25}, {"a": 0.25, "b": 0.75}) == 0.5
