"""The upsamplers: aligned crops, degradations against scipy and Pillow's bounds, any size, one seed an image."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch.nn import functional as F

from minunclip.config import PRESETS
from minunclip.diffusion import make_schedule
from minunclip.models import upsampler
from minunclip.models.upsampler import (
    Upsampler,
    blur,
    degrade,
    degrade_blur,
    degrade_bsr,
    gaussian_kernels,
    random_crop,
    resize,
    sample_upsampler,
    training_pair,
    upsampler_loss,
)

FIRST, SECOND = PRESETS["tiny"].upsampler1, PRESETS["tiny"].upsampler2
SCHEDULE = make_schedule("cosine")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(batch: int, size: int, seed: int = 0) -> torch.Tensor:
    return resize(torch.rand(batch, 3, 8, 8, generator=generator(seed)) * 2 - 1, (size, size))


def awake(config) -> Upsampler:
    torch.manual_seed(0)
    model = Upsampler(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("config", [FIRST, SECOND])
@pytest.mark.parametrize("low, high", [((4, 4), (16, 16)), ((6, 10), (24, 40))])
def test_any_size(config, low, high):
    out = awake(config)(torch.randn(2, 3, *high), torch.tensor([1, 2]), torch.rand(2, 3, *low))
    assert out.shape == (2, 3, *high)


def test_resizing_before_or_inside_is_the_same():
    model, x_t, low = awake(FIRST), torch.randn(2, 3, 32, 32), smooth(2, 16)
    t = torch.tensor([3, 500])
    torch.testing.assert_close(model(x_t, t, low), model(x_t, t, resize(low, (32, 32))), rtol=0, atol=0)
    assert (model(x_t, t, low) - model(x_t, t, -low)).abs().max() > 1e-3


def test_samples_do_not_mix():
    model, x_t, low, t = awake(FIRST), torch.randn(4, 3, 16, 16), torch.rand(4, 3, 8, 8), torch.arange(4)
    other = low.clone()
    other[0] = -other[0]
    before, after = model(x_t, t, low), model(x_t, t, other)
    torch.testing.assert_close(after[1:], before[1:], rtol=1e-4, atol=1e-4)
    assert (after[0] - before[0]).abs().max() > 1e-3


def test_a_new_upsampler_answers_zero_with_twice_the_channels_for_learned_variance():
    config = dataclasses.replace(FIRST, diffusion=dataclasses.replace(FIRST.diffusion, learned_variance=True))
    assert torch.equal(Upsampler(config)(torch.randn(1, 3, 16, 16), torch.tensor([5]), torch.rand(1, 3, 8, 8)), torch.zeros(1, 6, 16, 16))


def test_configurations_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="no attention"):
        Upsampler(dataclasses.replace(FIRST, unet=dataclasses.replace(FIRST.unet, attention_at=(8,))))
    with pytest.raises(ValueError, match="not a multiple"):
        Upsampler(dataclasses.replace(FIRST, low_size=12))


def test_resize_against_pillow():
    """Pillow's bicubic is antialiased too: the same picture within a few 8-bit steps."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((8, 8), Image.Resampling.BICUBIC)).astype(np.float32)
    ours = resize(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1, (8, 8))
    assert np.abs((ours[0].permute(1, 2, 0).numpy() + 1) * 127.5 - expected).max() < 3


def test_crops_are_aligned():
    high = smooth(6, 128)
    low = resize(high, (32, 32))
    high_crop, low_crop = random_crop(high, low, 4, generator())
    assert high_crop.shape == (6, 3, 32, 32) and low_crop.shape == (6, 3, 8, 8)
    inner = (..., slice(2, -2), slice(2, -2))  # bicubic downscaling sees two low-resolution pixels beyond
    torch.testing.assert_close(resize(high_crop, (8, 8))[inner], low_crop[inner], rtol=1e-4, atol=1e-4)


def test_crops_are_parts_of_their_own_image_and_reach_every_corner():
    index = torch.arange(16.0)
    low = (torch.arange(200.0)[:, None, None] * 256 + index[:, None] * 16 + index)[:, None].expand(-1, 3, -1, -1)  # names image, row and column
    high = low.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    high_crop, low_crop = random_crop(high, low, 4, generator())
    assert torch.equal(high_crop[..., ::2, ::2], low_crop) and torch.equal(high_crop[..., 1::2, 1::2], low_crop)
    assert torch.equal(low_crop[:, 0, 0, 0] // 256, torch.arange(200.0))
    assert torch.equal(low_crop[:, 0, 3, 3] - low_crop[:, 0, 0, 0], torch.full((200,), 3 * 16 + 3.0))
    rows, columns = low_crop[:, 0, 0, 0] % 256 // 16, low_crop[:, 0, 0, 0] % 16
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(13))
    assert not torch.equal(rows, columns)


def test_crops_keep_dtype_follow_the_seed_and_refuse_what_does_not_fit():
    high, low = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    (a, b), (c, d) = random_crop(high, low, 4, generator(3)), random_crop(high, low, 4, generator(3))
    assert a.dtype == torch.uint8 and torch.equal(a, c) and torch.equal(b, d)
    for wrong in (low[..., :6], low[..., :6, :6], torch.zeros(2, 3, 12, 12)):
        with pytest.raises(ValueError, match="cannot crop"):
            random_crop(high, wrong, 4, generator())


def test_blur_against_scipy():
    images = torch.rand(2, 3, 9, 11) * 2 - 1
    expected = ndimage.gaussian_filter(images.numpy(), sigma=(0, 0, 0.6, 0.6), radius=(0, 0, 1, 1), mode="mirror")
    torch.testing.assert_close(degrade_blur(images), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_turned_kernels():
    sigma_x, sigma_y, angle = torch.tensor([0.5, 0.5]), torch.tensor([1.5, 1.5]), torch.tensor([0.0, torch.pi / 2])
    upright, lying = gaussian_kernels(sigma_x, sigma_y, angle, 5)
    assert upright[:, 2].sum() > 0.7 > upright[2].sum()  # narrow along x: most of its weight stands in the middle column
    torch.testing.assert_close(upright.T, lying)
    torch.testing.assert_close(upright.sum(), torch.tensor(1.0))
    expected = ndimage.convolve(np.eye(7), upright.numpy(), mode="mirror")
    torch.testing.assert_close(blur(torch.eye(7)[None, None], upright[None])[0, 0], torch.from_numpy(expected).float())


@pytest.mark.parametrize("name", ["_random_blur", "_random_resize", "_random_noise", "_random_jpeg", "degrade_bsr"])
def test_bsr_operations(name):
    """Shape kept, the picture changed but mildly, another seed another result, the same seed the same."""
    operation, images = getattr(upsampler, name), smooth(3, 48)
    a, b, c = operation(images, generator(1)), operation(images, generator(1)), operation(images, generator(2))
    assert a.shape == images.shape and a.dtype == images.dtype
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert 1e-4 < (a - images).abs().mean() < 0.1


def test_bsr_stays_in_range_leaves_its_input_and_shuffles_the_order(monkeypatch):
    images = torch.rand(2, 3, 8, 8).round() * 2 - 1
    before = images.clone()
    for seed in range(10):
        out = degrade_bsr(images, generator(seed))
        assert out.min() >= -1 and out.max() <= 1
    assert torch.equal(images, before)
    orders = []
    for name in ("_random_blur", "_random_resize", "_random_noise", "_random_jpeg"):
        monkeypatch.setattr(upsampler, name, lambda x, g, name=name: orders[-1].append(name) or x)
    for seed in range(20):
        orders.append([])
        degrade_bsr(images, generator(seed))
    assert all(len(set(order)) == 4 for order in orders) and len({tuple(order) for order in orders}) > 5


def test_bsr_leaves_each_part_out_in_half_of_the_pictures():
    images = smooth(640, 8)
    untouched = (degrade_bsr(images, generator(0)) == images).flatten(1).all(dim=1)
    assert 20 < untouched.sum() < 65  # all four parts left out: of 640 pictures 40, give or take 6


def test_jpeg_is_pillows(monkeypatch):
    images = smooth(2, 16)
    qualities = torch.randint(60, 96, (2,), generator=generator(5)).tolist()
    out = upsampler._random_jpeg(images, generator(5))
    for picture, quality, ours in zip(images, qualities, out):
        file = io.BytesIO()
        Image.fromarray(((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(file, format="jpeg", quality=quality)
        assert np.array_equal(np.asarray(Image.open(file)), ((ours + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def test_noise_comes_on_top_of_the_blur_each_picture_its_own_strength_up_to_the_most():
    images, config = smooth(64, 32), dataclasses.replace(FIRST, noise=0.3)
    assert torch.equal(degrade(FIRST, images, generator()), degrade_blur(images))
    deviations = (degrade(config, images, generator()) - degrade_blur(images)).std(dim=(1, 2, 3))
    assert 0.27 < deviations.max() < 0.31 and deviations.min() < 0.03  # of 64, even from 0 to 0.3
    assert 0.12 < deviations.mean() < 0.18


@pytest.mark.parametrize("config, side", [(FIRST, 8), (dataclasses.replace(FIRST, crop=2), 16), (SECOND, 16)])
def test_training_pair_and_loss(config, side):
    high = smooth(4, config.high_size)
    low = resize(high, (config.low_size, config.low_size))
    target, condition = training_pair(config, high, low, generator(2))
    clean_target, clean = random_crop(high, low, config.crop, generator(2))
    assert target.shape == (4, 3, side, side) and condition.shape == (4, 3, config.low_size // config.crop, config.low_size // config.crop)
    assert torch.equal(target, clean_target) and not torch.equal(condition, clean)
    model = Upsampler(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = upsampler_loss(model, SCHEDULE, target, condition, torch.tensor([0, 1, 500, 999]), torch.randn_like(target))
    loss.mean().backward()
    assert loss.shape == (4,) and loss.isfinite().all() and model.unet.conv_out.weight.grad.abs().max() > 0


@pytest.mark.parametrize("config", [FIRST, SECOND])
def test_sampling_full_size_by_seed(config):
    model, low = awake(config), smooth(3, config.low_size)
    together = sample_upsampler(model, SCHEDULE, low, seeds=[4, 5, 6], steps=3)
    alone = sample_upsampler(model, SCHEDULE, low[1:2], seeds=[5], steps=3)
    assert together.shape == (3, 3, config.high_size, config.high_size) and together.abs().max() <= 1 + 1e-5
    torch.testing.assert_close(together[1:2], alone, rtol=1e-3, atol=1e-3)
    assert (sample_upsampler(model, SCHEDULE, low[1:2], seeds=[6], steps=3) - alone).abs().max() > 0.02
    with pytest.raises(ValueError, match="2 seeds for 3 images"):
        sample_upsampler(model, SCHEDULE, low, seeds=[0, 1])


@pytest.mark.parametrize("config", [FIRST, SECOND])
def test_autocast_speeds_the_network_and_spares_the_picture(config):
    model, low = awake(config), smooth(1, config.low_size)
    blurred = degrade_blur(low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(degrade_blur(low), blurred, rtol=0, atol=0)
        assert sample_upsampler(model, SCHEDULE, low, seeds=[0], steps=2).dtype == torch.float32


@pytest.mark.parametrize("config", [FIRST, SECOND])
def test_sampling_blurs_as_training_did_and_leaves_bsr_out(config, monkeypatch):
    seen, low = [], smooth(1, config.low_size)
    monkeypatch.setattr(Upsampler, "forward", lambda self, x_t, t, low_resolution: seen.append(low_resolution) or x_t)
    sample_upsampler(Upsampler(config), SCHEDULE, low, seeds=[0], steps=1)
    expected = degrade_blur(low) if config is FIRST else low
    torch.testing.assert_close(seen[0], resize(expected, (config.high_size, config.high_size)))


def test_the_papers_upsamplers_have_their_sizes():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in Upsampler(c).parameters()) for c in (PRESETS["paper"].upsampler1, PRESETS["paper"].upsampler2)]
    assert 650e6 < sizes[0] < 750e6 and 270e6 < sizes[1] < 330e6  # Tab. 3: 700M and 300M


@pytest.mark.slow
def test_it_learns_to_sharpen_one_image():
    torch.manual_seed(0)
    # x_0, not v: a net this narrow cannot carry the noise of a whole patch, which is half of v
    config = dataclasses.replace(FIRST, diffusion=dataclasses.replace(FIRST.diffusion, objective="x0"))
    model = Upsampler(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    high = torch.full((1, 3, 32, 32), -0.8)
    high[..., 9:22, 7:27] = 0.8
    low = resize(high, (16, 16))
    many, seen = high.expand(8, -1, -1, -1), degrade_blur(low).expand(8, -1, -1, -1)
    for _ in range(100):
        loss = upsampler_loss(model, SCHEDULE, many, seen, torch.randint(0, 1000, (8,)), torch.randn_like(many)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = sample_upsampler(model.eval(), SCHEDULE, low, seeds=[0], steps=8)
    assert F.mse_loss(drawn, high) < 0.2 * F.mse_loss(resize(low, (32, 32)), high)


@torch.no_grad()
def test_the_last_step_may_have_a_network_of_its_own_and_see_bicubics_overshoot():
    config = dataclasses.replace(FIRST, last_step=True, clamp=False, degradation="none")
    model, low, x_t = awake(config), smooth(2, 16).sign(), torch.randn(2, 3, 32, 32)
    seen = torch.nn.functional.interpolate(low, size=(32, 32), mode="bicubic", antialias=True, align_corners=False)
    assert seen.abs().max() > 1 and degrade(config, low, generator()) is low
    for network, timestep in ((model, torch.tensor([0, 5])), (model.last, torch.zeros(2, dtype=torch.int64))):
        expected = network.unet(torch.cat([x_t, seen], dim=1), network.timestep_mlp(timestep))
        torch.testing.assert_close(model(x_t, timestep, low), expected)
