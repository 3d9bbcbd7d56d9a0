"""The caption checker: reads a picture back into a scene, so that whether a picture answers its caption is counted, not judged.

The paper asks people (section 5.2) and notes where unCLIP fails: binding attributes to things (section 7, Fig. 14) and writing words
(Fig. 16). Here a small network, trained on drawn scenes alone and never on a generated picture, finds the things and their attributes;
`captions.compare` then holds them against the caption. The reader errs too: `reader_error` says how often, and no score means more than that.

It works like CenterNet (Zhou et al. 2019, "Objects as Points"): a thing is a peak on a 16 by 16 map, and its attributes are read off at the peak.
Small and large things have maps of their own, for a small thing may lie inside a large one, at the very same place.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from minunclip.config import CheckerConfig
from minunclip.data.captions import Report, caption, compare, parse
from minunclip.data.render import render
from minunclip.data.scenes import BACKGROUNDS, COLOURS, NESTED, RADIUS, SHAPES, SIZES, TEXTURES, Scene, Thing, kind_of, sample_scenes
from minunclip.data.world import to_tensor
from minunclip.evaluation import accuracy
from minunclip.models.upsampler import blur, gaussian_kernels, resize

SIDE = 64  # every picture is read at this size
CELLS = 16  # a side of the maps
MOST = 3  # things in a scene
PARTS = (1, len(SHAPES), len(COLOURS), len(TEXTURES), 2)  # channels of each size's map: is a thing here, shape, colour, texture, offset
NO_WORD = len(SHAPES)
CHUNK = 256


class Reading(NamedTuple):
    """What the network says, as logits: things (B, size, sum(PARTS), 16, 16), background (B, 6), word (B, 9), the last for none.

    Offsets are in cells, from the middle of the cell to the thing's centre.
    """

    things: Tensor
    background: Tensor
    word: Tensor


def _convolution(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU())


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(_convolution(width, width), _convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _pool(features: Tensor) -> Tensor:
    return torch.cat([reduce(features, "b c h w -> b c", how) for how in ("mean", "max")], dim=1)


class SceneReader(nn.Module):
    """A picture to what it shows."""

    def __init__(self, config: CheckerConfig):
        super().__init__()
        self.config = config
        width, deep = 2 * config.width, 3 * config.width
        self.fine = nn.Sequential(
            _convolution(3, config.width, 2), _convolution(config.width, config.width), _convolution(config.width, width, 2), _Residual(width)
        )
        self.coarse = nn.Sequential(_convolution(width, deep, 2), _Residual(deep), _Residual(deep), nn.Conv2d(deep, width, 1))  # sees it all
        self.join = _Residual(width)
        self.things = nn.Conv2d(width, len(SIZES) * sum(PARTS), 1)
        self.whole = nn.Sequential(nn.Linear(2 * width, deep), nn.ReLU(), nn.Linear(deep, len(BACKGROUNDS) + NO_WORD + 1))
        with torch.no_grad():  # most cells are empty: start from there
            rearrange(self.things.bias, "(size part) -> size part", size=len(SIZES))[:, 0] = -4.0  # type: ignore[index]

    def forward(self, images: Tensor) -> Reading:
        """(B, 3, 64, 64) in [-1, 1]."""
        seen = self._map(images)
        things = rearrange(self.things(seen), "b (size part) h w -> b size part h w", size=len(SIZES))
        background, word = self.whole(_pool(seen)).split((len(BACKGROUNDS), NO_WORD + 1), dim=1)
        return Reading(things.float(), background.float(), word.float())

    def _map(self, images: Tensor) -> Tensor:
        fine = self.fine(images)
        return self.join(fine + F.interpolate(self.coarse(fine), size=fine.shape[2:], mode="nearest"))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], of any size, to what is read off them, (B, 4 * width): a space for Fréchet distances that CLIP has no part in."""
        device = next(self.parameters()).device
        return torch.cat([_pool(self._map(resize(part.to(device, torch.float32), (SIDE, SIDE)))) for part in images.split(CHUNK)])

    @torch.no_grad()
    def read(self, images: Tensor) -> list[Scene]:
        """Pictures (B, 3, H, W) in [-1, 1], of any size, to the scenes that they show: see `decode`. The reader must be in eval mode."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"pictures to read must be (B, 3, H, W), not {tuple(images.shape)}")
        if self.training:
            raise ValueError("the reader is in training mode, where pictures of a batch change each other's reading: call reader.eval() first")
        device = next(self.parameters()).device
        return [scene for part in images.split(CHUNK) for scene in decode(self(resize(part.to(device, torch.float32), (SIDE, SIDE))))]


def decode(reading: Reading) -> list[Scene]:
    """Scenes of at most three things: the highest peaks whose probability is over one half, small things first, as they lie on top.

    What a caption cannot ask for (radius, rotation, shade, the label's place) gets nominal values; `relation` is None, `scenes.holds` tells it.
    """
    here = reading.things[:, :, 0]  # logits: probabilities of sure peaks would all round to 1 and tie
    peaks = here.masked_fill((here < F.max_pool2d(here, 3, 1, 1)) | (here <= 0), -torch.inf)
    scores, places = rearrange(peaks, "b size h w -> b (size h w)").topk(MOST, dim=1)
    cells = rearrange(reading.things, "b size part h w -> b (size h w) part")
    found = cells.gather(1, places[:, :, None].expand(-1, -1, cells.shape[2]))
    _, *attributes, offset = found.split(PARTS, dim=2)
    shape, colour, texture = (logits.argmax(dim=2).tolist() for logits in attributes)
    size, row, column = places // CELLS**2, places // CELLS % CELLS, places % CELLS
    x, y = ((column + 0.5 + offset[..., 0]) / CELLS).tolist(), ((row + 0.5 + offset[..., 1]) / CELLS).tolist()
    real, sizes = scores.isfinite().tolist(), [[SIZES[s] for s in line] for line in size.tolist()]
    backgrounds, words = reading.background.argmax(dim=1).tolist(), reading.word.argmax(dim=1).tolist()

    def thing(b: int, i: int) -> Thing:
        kind = (SHAPES[shape[b][i]], tuple(COLOURS)[colour[b][i]], TEXTURES[texture[b][i]], sizes[b][i])
        return Thing(*kind, x[b][i], y[b][i], radius=sum(RADIUS[sizes[b][i]]) / 2, rotation=0.0, shade=(0.0, 0.0, 0.0))

    scenes = []
    for b in range(len(here)):
        things = sorted((thing(b, i) for i in range(MOST) if real[b][i]), key=lambda t: SIZES.index(t.size))
        word = None if words[b] == NO_WORD else SHAPES[words[b]]
        scenes.append(Scene(tuple(things), tuple(BACKGROUNDS)[backgrounds[b]], word=word))
    return scenes


def matches(image: Tensor, text: str, reader: SceneReader) -> Report:
    """How the picture (3, H, W) in [-1, 1] answers the caption, as the reader sees it."""
    return compare(parse(text), reader.read(image[None])[0])


def reader_error(reader: SceneReader, count: int, seed: int, size: int, kind: str | None = None) -> dict[str, float]:
    """The reader's own error on drawn scenes of the held-out split and their full captions: the share of mentions of each attribute that
    it gets wrong, where the picture is right; under "all_right", the share of pictures with any such error. Use a seed it was not trained with.
    Of `count` scenes all are read, or those of one of `scenes.KINDS` alone.
    """
    scenes = [scene for scene in sample_scenes(count, seed, held_out=True) if kind in (None, kind_of(scene))]
    rng = np.random.default_rng([seed, 9])
    parts = [scenes[i : i + CHUNK] for i in range(0, len(scenes), CHUNK)]
    seen = [scene for part in parts for scene in reader.read(to_tensor(render(part, size)))]
    reports = [compare(parse(caption(scene, "full", rng)), read) for scene, read in zip(scenes, seen)]
    return {attribute: 1 - share for attribute, share in accuracy(reports).items()}


# ---- training ----


class Targets(NamedTuple):
    """Scenes as tensors. Things: kind (B, 3, 4) int64 of size, shape, colour, texture; centre (B, 3, 2) in cells; real (B, 3) bool."""

    kind: Tensor
    centre: Tensor
    real: Tensor
    background: Tensor  # (B,)
    word: Tensor  # (B,)


def targets(scenes: list[Scene]) -> Targets:
    kind, centre = torch.zeros(len(scenes), MOST, 4, dtype=torch.int64), torch.zeros(len(scenes), MOST, 2)
    real = torch.zeros(len(scenes), MOST, dtype=torch.bool)
    colours, backgrounds = tuple(COLOURS), tuple(BACKGROUNDS)
    for b, scene in enumerate(scenes):
        for i, t in enumerate(scene.things):
            kind[b, i] = torch.tensor([SIZES.index(t.size), SHAPES.index(t.shape), colours.index(t.colour), TEXTURES.index(t.texture)])
            centre[b, i] = torch.tensor([t.x * CELLS, t.y * CELLS])
            real[b, i] = True
    word = torch.tensor([NO_WORD if s.word is None else SHAPES.index(s.word) for s in scenes])
    return Targets(kind, centre, real, torch.tensor([backgrounds.index(s.background) for s in scenes]), word)


def reader_loss(reading: Reading, wanted: Targets) -> Tensor:
    """CenterNet's focal loss for the peaks, cross-entropy for what they are, L1 for where, all over the number of things."""
    batch, slot = wanted.real.nonzero(as_tuple=True)
    size, shape, colour, texture = wanted.kind[batch, slot].unbind(dim=1)
    x, y = wanted.centre[batch, slot].unbind(dim=1)
    middles = torch.arange(CELLS, device=x.device) + 0.5
    bump = torch.exp(-((middles[None, :, None] - y[:, None, None]).round() ** 2 + (middles[None, None, :] - x[:, None, None]).round() ** 2) / 2)
    heat = torch.zeros_like(reading.things[:, :, 0])
    flat = rearrange(heat, "b size h w -> (b size) h w")
    where = rearrange(batch * len(SIZES) + size, "n -> n 1 1").expand_as(bump)
    heat = rearrange(flat.scatter_reduce(0, where, bump, "amax"), "(b size) h w -> b size h w", size=len(SIZES))
    logit = reading.things[:, :, 0]
    chance = logit.sigmoid()
    at_peak = -((1 - chance) ** 2) * F.logsigmoid(logit)
    elsewhere = -((1 - heat) ** 4) * chance**2 * F.logsigmoid(-logit)
    loss = torch.where(heat == 1, at_peak, elsewhere).sum() / len(batch)
    # the peak that is found may be a cell off: its neighbours learn the attributes too
    steps = torch.tensor([-1, 0, 1], device=x.device)
    rows = (y.long()[:, None, None] + steps[:, None]).clamp(0, CELLS - 1).expand(-1, 3, 3)
    columns = (x.long()[:, None, None] + steps[None, :]).clamp(0, CELLS - 1).expand(-1, 3, 3)
    cells = reading.things[batch[:, None, None], size[:, None, None], :, rows, columns]  # (things, 3, 3, parts)
    _, *attributes, offset = cells.split(PARTS, dim=3)
    for logits, name in zip(attributes, (shape, colour, texture)):
        loss = loss + F.cross_entropy(rearrange(logits, "n i j c -> n c i j"), name[:, None, None].expand(-1, 3, 3))
    true_offset = torch.stack([x[:, None, None] - columns - 0.5, y[:, None, None] - rows - 0.5], dim=3)
    loss = loss + F.l1_loss(offset, true_offset)
    return loss + F.cross_entropy(reading.background, wanted.background) + F.cross_entropy(reading.word, wanted.word)


def _spoil(images: Tensor, generator: torch.Generator) -> Tensor:
    """A little blur on half of the pictures and a little noise on all: the reader is to forgive what a generator does at edges."""
    soft = torch.rand(len(images), generator=generator) < 0.5
    sigma = 0.3 + 0.7 * torch.rand(int(soft.sum()), generator=generator)
    if len(sigma):
        images[soft] = blur(images[soft], gaussian_kernels(sigma, sigma, torch.zeros_like(sigma), 5))
    strength = 0.1 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return (images + strength * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def reader_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes to train the reader on: of all combinations, as it must know the held-out ones too, with words in one of six, and
    with a thing inside another in one of three: hard to read, and rare otherwise.
    """

    def drawn(count: int, seed: int) -> list[Scene]:
        return sample_scenes(count - count // 2, seed) + sample_scenes(count // 2, seed, held_out=True)

    words = [scene for scene in sample_scenes(2 * count, seed + 1) if scene.word]
    return drawn(count, seed) + words + [scene for scene in drawn(6 * count, seed + 3) if kind_of(scene) == NESTED]


def reader_batches(scenes: list[Scene], batch_size: int, seed: int) -> Callable[[int], dict[str, Tensor]]:
    """What training step `step` sees, for `training.fit`: half of the pictures are drawn 32 pixels wide and blown up, as the decoder's will be."""
    sharp, soft, wanted = render(scenes, SIDE), render(scenes, SIDE // 2), targets(scenes)
    half = batch_size // 2

    def batch(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        index = torch.randint(len(scenes), (batch_size,), generator=generator)
        small = resize(to_tensor(soft[index[half:].numpy()]), (SIDE, SIDE))
        images = _spoil(torch.cat([to_tensor(sharp[index[:half].numpy()]), small]), generator)
        labels = {name: part[index] for name, part in wanted._asdict().items()}
        return {"images": images.contiguous(memory_format=torch.channels_last), **labels}

    return batch


def reader_batch_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """`reader_loss` of one of `reader_batches`."""
    return reader_loss(model(batch["images"]), Targets(*(batch[name] for name in Targets._fields)))
