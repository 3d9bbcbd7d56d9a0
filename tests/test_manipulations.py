import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minunclip.data.render import render
from minunclip.data.scenes import sample_scenes
from minunclip.data.world import to_tensor
from minunclip.manipulations import interpolate, reconstruct, slerp, text_diff, variations
from minunclip.pipeline import UnCLIP


@pytest.fixture(scope="module")
def model(tiny_weights):
    return UnCLIP.from_pretrained(tiny_weights)


@pytest.fixture(scope="module")
def pictures():
    return to_tensor(render(sample_scenes(2, 5), 16))


@given(st.floats(0, 1), st.integers(0, 99))
def test_slerp_goes_along_the_great_circle(share, seed):
    a, b = torch.nn.functional.normalize(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)
    between = slerp(a, b, share)
    torch.testing.assert_close(between.norm(dim=1), torch.ones(3, dtype=torch.float64))
    angle = torch.acos((a * b).sum(dim=1))
    torch.testing.assert_close((a * between).sum(dim=1), torch.cos(share * angle), atol=1e-7, rtol=0)
    torch.testing.assert_close((b * between).sum(dim=1), torch.cos((1 - share) * angle), atol=1e-7, rtol=0)


def test_slerp_of_a_thing_with_itself_is_itself():
    a = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    torch.testing.assert_close(slerp(a, torch.randn_like(a), 0.0), a)


@pytest.mark.slow
def test_inversion_and_back_gives_the_picture_better_with_more_steps(model, pictures):
    errors = [(reconstruct(model, pictures, steps) - pictures).square().mean() for steps in (5, 50, 250)]
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.01


def test_one_step_is_no_inversion(model, pictures):
    with pytest.raises(ValueError, match="2 or more"):
        reconstruct(model, pictures, 1)


def test_variations_start_from_the_picture_and_spread_with_eta(model, pictures):
    still = variations(model, pictures, 2, eta=0.0, steps=20)
    assert still.shape == (2, 2, 3, 16, 16)
    torch.testing.assert_close(still[:, 0], model.redraw(*model.invert(pictures, 20), range(2), 20), atol=1e-4, rtol=0)
    torch.testing.assert_close(still[:, 0], still[:, 1], atol=1e-4, rtol=0)
    little, much = (variations(model, pictures, 2, eta=eta, steps=20) for eta in (0.2, 1.0))
    spread = [(v[:, 0] - v[:, 1]).abs().mean() for v in (little, much)]
    assert 0 < spread[0] < spread[1]
    again = variations(model, pictures, 2, eta=1.0, steps=20)
    assert torch.equal(again, much)
    assert not torch.equal(variations(model, pictures, 2, eta=1.0, seed=9, steps=20), much)


def test_interpolation_ends_at_both_pictures(model, pictures):
    start, end = pictures.split(1)
    frames = interpolate(model, start, end, [0.0, 0.5, 1.0], steps=20)
    back = model.redraw(*model.invert(pictures, 20), range(2), 20)
    assert frames.shape == (1, 3, 3, 16, 16)
    torch.testing.assert_close(frames[0, 0], back[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(frames[0, 2], back[1], atol=1e-3, rtol=0)
    fixed = interpolate(model, start, end, [0.0], noise_seed=3, steps=20)
    assert (fixed[:, 0] - frames[:, 0]).abs().mean() > 0.01
    ends = [interpolate(model, first, end, [share], noise_seed=3, steps=20) for first, share in ((start, 1.0), (end, 0.0))]
    torch.testing.assert_close(*ends, atol=1e-3, rtol=0)  # one noise all the way


def test_a_text_diff_starts_at_the_picture_and_turns_z_i(model, pictures, monkeypatch):
    asked = []
    redraw = UnCLIP.redraw
    monkeypatch.setattr(UnCLIP, "redraw", lambda self, z_i, *rest, **more: asked.append(z_i) or redraw(self, z_i, *rest, **more))
    frames = text_diff(model, pictures, ["a red star", "a ring"], ["a blue star", "a heart"], [0.0, 0.25, 0.5], steps=20)
    assert frames.shape == (2, 3, 3, 16, 16)
    z_i = model.embed(pictures)
    z_d = torch.nn.functional.normalize(model.read(["a blue star", "a heart"]).z_t - model.read(["a red star", "a ring"]).z_t, dim=1)
    torch.testing.assert_close(asked[0], z_i, atol=1e-5, rtol=0)
    torch.testing.assert_close(frames[:, 0], model.redraw(*model.invert(pictures, 20), range(2), 20), atol=1e-3, rtol=0)
    whole = torch.acos((z_i * z_d).sum(dim=1))
    for share, z in zip((0.25, 0.5), asked[1:]):
        turned = torch.acos((z_i * z).sum(dim=1).clamp(-1, 1))
        np.testing.assert_allclose(turned, share * whole, atol=1e-3)
    assert not math.isnan(float(frames.sum()))
    with pytest.raises(ValueError, match="'a ring' is to become the same caption"):
        text_diff(model, pictures, ["a red star", "a ring"], ["a blue star", "a ring"], [0.25], steps=20)


def test_a_picture_of_another_size_is_not_inverted(model, pictures):
    for height, width in ((32, 32), (16, 32)):
        with pytest.raises(ValueError, match=f"pictures of {height} x {width} pixels cannot be inverted: the decoder draws 16 x 16"):
            model.invert(torch.zeros(1, 3, height, width), 20)
