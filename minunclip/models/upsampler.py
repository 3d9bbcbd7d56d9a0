"""The upsamplers: two diffusion models that make an image four times as large, one after the other.

Paper: section 2.1, "Decoder", last paragraph. ADM U-Nets without attention, caption or guidance, that see the low-resolution image, resized to
the size of the output, as three more channels. They are trained on random crops, and being convolutional work at full size.
To make them robust the low-resolution image is corrupted: by a Gaussian blur for the first, by the random degradations of BSRGAN (Zhang et al.
2021) for the second.

Different from the paper: the BSR degradation is a short, mild one (no sensor noise, no second downsampling pass, each of its parts left out in half of
the pictures), and noise may come on top of either, since a small decoder errs more (`UpsamplerConfig.noise`).
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from minunclip.config import UpsamplerConfig
from minunclip.diffusion import OnStep, SamplerName, Schedule, SeededNoise, make_denoiser, sample, training_loss
from minunclip.models.unet import TimestepMLP, UNet


def resize(images: Tensor, size: tuple[int, int], clamp: bool = True) -> Tensor:
    """Bicubic with antialiasing: the one resize of training and sampling alike. (B, C, H, W) to (B, C, *size); clamped, as bicubic overshoots."""
    if images.shape[2:] == size:
        return images
    images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
    return images.clamp(-1, 1) if clamp else images


class Upsampler(nn.Module):
    """A low-resolution image and noise to a high-resolution image, by diffusion."""

    def __init__(self, config: UpsamplerConfig):
        super().__init__()
        if config.unet.attention_at:
            raise ValueError(f"an upsampler has no attention, as it must work at any size: set attention_at to (), not {config.unet.attention_at}")
        if config.high_size % config.low_size:
            raise ValueError(f"high_size {config.high_size} is not a multiple of low_size {config.low_size}: change one of them")
        self.config = config
        self.timestep_mlp = TimestepMLP(config.unet.width)
        channels_out = 6 if config.diffusion.learned_variance else 3
        self.unet = UNet(config.unet, None, 3 + 3, channels_out, 4 * config.unet.width)
        self.last = Upsampler(replace(config, last_step=False)) if config.last_step else None

    def forward(self, x_t: Tensor, timestep: Tensor, low_resolution: Tensor) -> Tensor:
        """x_t (B, 3, H, W), timestep (B,), low_resolution (B, 3, h, w) in [-1, 1] of any size, to (B, 3 or 6, H, W)."""
        if self.last is not None and not timestep.any():  # sampling ends at timestep 0
            return self.last(x_t, timestep, low_resolution)
        seen = resize(low_resolution, (x_t.shape[2], x_t.shape[3]), self.config.clamp)
        return self.unet(torch.cat([x_t, seen.to(x_t.dtype)], dim=1), self.timestep_mlp(timestep))


# ---- training pairs ----


def crop(images: Tensor, top: Tensor, left: Tensor, side: int) -> Tensor:
    """Of each image (B, C, H, W) its own square: rows top .. top + side, columns left .. left + side."""
    batch = torch.arange(len(images))[:, None, None]
    rows, columns = top[:, None] + torch.arange(side), left[:, None] + torch.arange(side)
    return rearrange(images[batch, :, rows[:, :, None], columns[:, None, :]], "b h w c -> b c h w")


def random_crop(high: Tensor, low: Tensor, share: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same random square, one `share`-th of the side, of each image in high (B, 3, H, H) and low (B, 3, h, h): any dtype.

    Offsets are whole pixels of the low-resolution image, so that the two crops show exactly the same part.
    """
    scale, side = high.shape[2] // low.shape[2], low.shape[2] // share
    if low.shape[2] % share or low.shape[2] != low.shape[3] or high.shape[2:] != (scale * low.shape[2], scale * low.shape[3]):
        raise ValueError(f"cannot crop {tuple(high.shape[2:])} and {tuple(low.shape[2:])} alike: squares, low's side a multiple of {share}, high's of low's")
    top, left = torch.randint(0, low.shape[2] - side + 1, (2, len(low)), generator=generator)
    return crop(high, scale * top, scale * left, scale * side), crop(low, top, left, side)


def training_pair(config: UpsamplerConfig, high: Tensor, low: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch for `upsampler_loss`: target and its corrupted low resolution, crops of whole images (B, 3, H, H) and (B, 3, h, h) in [-1, 1].

    `low` is `resize(high, ...)` or the same scene drawn small. It is made before cropping, so that the crop's edges look as in a whole image.
    """
    target, condition = random_crop(high, low, config.crop, generator)
    return target, degrade(config, condition, generator)


# ---- degradations: (B, C, H, W) in [-1, 1] to the same ----


def degrade(config: UpsamplerConfig, images: Tensor, generator: torch.Generator) -> Tensor:
    """The degradation that this upsampler is trained with, and noise on top where its config asks for it, which may leave [-1, 1]."""
    if config.degradation != "none":
        images = degrade_blur(images) if config.degradation == "blur" else degrade_bsr(images, generator)
    return _random_noise(images, generator, config.noise) if config.noise else images


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Each image with its own kernel (B, k, k); the border mirrors."""
    radius = kernels.shape[-1] // 2
    padded = rearrange(F.pad(images, (radius,) * 4, mode="reflect"), "b c h w -> 1 (b c) h w")
    kernels = repeat(kernels.to(images), "b k l -> (b c) 1 k l", c=images.shape[1])
    with torch.autocast(images.device.type, enabled=False):  # autocast would round the picture to bfloat16
        blurred = F.conv2d(padded, kernels, groups=len(kernels))
    return rearrange(blurred, "1 (b c) h w -> b c h w", b=len(images))


def gaussian_kernels(sigma_x: Tensor, sigma_y: Tensor, angle: Tensor, size: int) -> Tensor:
    """(B,) deviations along two axes turned by `angle`, to (B, size, size) kernels that sum to one."""
    offset = torch.arange(size) - (size - 1) / 2
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    cos, sin = (rearrange(f, "b -> b 1 1") for f in (angle.cos(), angle.sin()))
    along, across = cos * x + sin * y, cos * y - sin * x
    exponent = (along / rearrange(sigma_x, "b -> b 1 1")) ** 2 + (across / rearrange(sigma_y, "b -> b 1 1")) ** 2
    kernels = torch.exp(-exponent / 2)
    return kernels / kernels.sum(dim=(1, 2), keepdim=True)


def degrade_blur(images: Tensor) -> Tensor:
    """The first upsampler's: a Gaussian blur, sigma 0.6, kernel 3. Not random, so sampling can apply the very same."""
    sigma = torch.full((len(images),), 0.6)
    return blur(images, gaussian_kernels(sigma, sigma, torch.zeros_like(sigma), 3)).clamp(-1, 1)


def _uniform(low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _random_blur(images: Tensor, generator: torch.Generator) -> Tensor:
    sigma_x, sigma_y = _uniform(0.2, 1.0, 2 * len(images), generator).chunk(2)
    return blur(images, gaussian_kernels(sigma_x, sigma_y, _uniform(0, math.pi, len(images), generator), size=5))


def _random_resize(images: Tensor, generator: torch.Generator) -> Tensor:
    """Down, then up again, each by a random interpolation; the scale is one for the batch."""
    scale = _uniform(0.6, 1.0, 1, generator).item()
    smaller = (max(1, round(scale * images.shape[2])), max(1, round(scale * images.shape[3])))
    for size in (smaller, (images.shape[2], images.shape[3])):
        mode = ("area", "bilinear", "bicubic")[int(torch.randint(3, (1,), generator=generator))]
        images = F.interpolate(images, size=size, mode=mode, antialias=mode != "area")
    return images


def _random_noise(images: Tensor, generator: torch.Generator, most: float = 0.05) -> Tensor:
    sigma = _uniform(0.0, most, len(images), generator)
    return images + (rearrange(sigma, "b -> b 1 1 1") * torch.randn(images.shape, generator=generator)).to(images)


def _random_jpeg(images: Tensor, generator: torch.Generator) -> Tensor:
    quality = torch.randint(60, 96, (len(images),), generator=generator).tolist()
    pixels = rearrange(((images.float().clamp(-1, 1) + 1) * 127.5).round().byte(), "b c h w -> b h w c").cpu().numpy()
    decoded = []
    for picture, q in zip(pixels, quality):  # one by one: a JPEG library knows no batches, and crops are tiny
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format="jpeg", quality=q)
        decoded.append(np.asarray(Image.open(file)))
    return rearrange(torch.from_numpy(np.stack(decoded)), "b h w c -> b c h w").to(images) / 127.5 - 1


def degrade_bsr(images: Tensor, generator: torch.Generator) -> Tensor:
    """The second upsampler's: blur, resize down and up, noise and JPEG, each of random strength, in random order (RGB images). Each image undergoes
    each of them with a chance of one half, so that sharp ones are known too.
    """
    operations: list[Callable[[Tensor, torch.Generator], Tensor]] = [_random_blur, _random_resize, _random_noise, _random_jpeg]
    for i in torch.randperm(len(operations), generator=generator).tolist():
        chosen = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(rearrange(chosen, "b -> b 1 1 1").to(images.device), operations[i](images, generator), images)
    return images.clamp(-1, 1)


# ---- loss and sampling ----


def upsampler_loss(model: Upsampler, schedule: Schedule, x_0: Tensor, low_resolution: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
    """The loss (B,) of each image x_0 (B, 3, H, W), given its low resolution, already corrupted: see `training_pair`."""
    config = model.config.diffusion
    seen = resize(low_resolution, (x_0.shape[2], x_0.shape[3]), model.config.clamp)
    return training_loss(schedule, config.objective, config.learned_variance, lambda x_t, t: model(x_t, t, seen), x_0, timestep, noise)


@torch.no_grad()
def sample_upsampler(
    model: Upsampler,
    schedule: Schedule,
    low_resolution: Tensor,
    seeds: Sequence[int],
    steps: int | None = None,
    sampler: SamplerName | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Images (B, 3, h, w) in [-1, 1], of any size, to (B, 3, 4h, 4w) (or what high_size / low_size is). One seed an image.

    The blur of training is applied here too: it is always the same, so the model has never seen a sharp image. The BSR degradation is not:
    it is random and ranges down to almost nothing, so the model knows clean images; degrading one would only throw detail away.
    """
    if len(seeds) != len(low_resolution):
        raise ValueError(f"{len(seeds)} seeds for {len(low_resolution)} images: give one seed an image")
    config, process = model.config, model.config.diffusion
    scale = config.high_size // config.low_size
    size = (scale * low_resolution.shape[2], scale * low_resolution.shape[3])
    seen = resize(degrade_blur(low_resolution) if config.degradation == "blur" else low_resolution, size, config.clamp)
    noise = SeededNoise(seeds)
    denoiser = make_denoiser(lambda x_t, t: model(x_t, t, seen), schedule, process.objective, process.learned_variance)
    x_T = noise((3, *size)).to(low_resolution)
    return sample(denoiser, schedule, x_T, sampler or process.sampler, process.sampling_steps if steps is None else steps, noise.like, on_step=on_step)
