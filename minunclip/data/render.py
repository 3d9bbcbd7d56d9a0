"""Draws scenes of the captioned world at any size, many at once, with anti-aliased edges.

Every shape is a signed distance to its outline: negative inside, positive outside, in units of the thing's radius. The share of a
pixel that a shape covers is then a clamp of that distance in pixels, so the same scene is as crisp at 512 as at 32.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from minunclip.data.scenes import BACKGROUNDS, COLOURS, Scene, Thing

LABEL_HEIGHT = 0.17  # of the white label that carries a word
OUTLINE = 0.014  # width of the full-coloured rim around a texture: it keeps the shape's silhouette
LIGHT = 0.65  # how far towards white the light parts of a texture go


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(v - 0.6, 0.866 * u.abs() - 0.5 * v - 0.6)


def _star(u: Tensor, v: Tensor) -> Tensor:
    """Five points: fold the plane into one half point, then the distance to its single edge."""
    angle = torch.atan2(u, -v)
    angle = (torch.remainder(angle + math.pi / 5, 2 * math.pi / 5) - math.pi / 5).abs()
    length = torch.hypot(u, v)
    x, y = length * angle.cos(), length * angle.sin()  # the point lies on the x axis at 1.2, the notch at 36 degrees, 0.6
    nx, ny = 0.6 * math.sin(math.pi / 5), 1.2 - 0.6 * math.cos(math.pi / 5)
    return ((x - 1.2) * nx + y * ny) / math.hypot(nx, ny)


def _heart(u: Tensor, v: Tensor) -> Tensor:
    """A square on its corner and a circle on each of its two upper sides."""
    side = 0.6
    square = ((u.abs() + (v - 0.15).abs()) / math.sqrt(2)) - side
    centre = side / math.sqrt(2)
    return torch.minimum(square, torch.hypot(u.abs() - centre, v - 0.15 + centre) - side)


def _cross(u: Tensor, v: Tensor) -> Tensor:
    u, v = u.abs(), v.abs()
    return torch.maximum(torch.maximum(u, v) - 1.0, torch.minimum(u, v) - 0.4)


DISTANCE = {
    "circle": lambda u, v: torch.hypot(u, v) - 1.0,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) - 0.87,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": lambda u, v: (torch.hypot(u, v) - 0.72).abs() - 0.3,
    "cross": _cross,
    "diamond": lambda u, v: (u.abs() / 0.78 + v.abs() / 1.2 - 1.0) * (0.78 * 1.2 / math.hypot(0.78, 1.2)),
}


def _pattern(texture: str, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance to the light part of a texture, in picture units: negative where it is light."""
    if texture == "striped":
        period = 0.15
        return 0.25 * period - (torch.remainder(u, period) - 0.5 * period).abs()
    if texture == "dotted":
        period = 0.14
        u, v = (torch.remainder(c + 0.5 * period, period) - 0.5 * period for c in (u, v))
        return torch.hypot(u, v) - 0.042
    cell = 0.1
    distance = [0.5 * cell - (torch.remainder(c, 2 * cell) - cell).abs() for c in (u, v)]  # checkered: a product of two square waves
    return torch.where(distance[0] * distance[1] < 0, -1.0, 1.0) * torch.minimum(distance[0].abs(), distance[1].abs())


@lru_cache
def _word_mask(word: str) -> Tensor:
    """The word in black letters, as a (1, 96, width) mask of 0 .. 1: drawn once, large, and scaled into every picture."""
    font = ImageFont.load_default(size=80)
    left, top, right, bottom = font.getbbox(word)
    picture = Image.new("L", (int(right - left) + 24, 96), 0)
    ImageDraw.Draw(picture).text((12 - left, 48), word, fill=255, font=font, anchor="lm", stroke_width=1)
    return torch.from_numpy(np.array(picture)).float()[None] / 255


def _paint_thing(canvas: Tensor, things: list[Thing], x: Tensor, y: Tensor, pixel: Tensor) -> Tensor:
    """Paints one thing of one shape and texture on each picture of (B, 3, H, W)."""
    column = lambda values: torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)  # noqa: E731
    radius, rotation = column([t.radius for t in things]), [t.rotation for t in things]
    cos, sin = column(np.cos(rotation)), column(np.sin(rotation))
    dx, dy = x - column([t.x for t in things]), y - column([t.y for t in things])
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    distance = DISTANCE[things[0].shape](u / radius, v / radius) * radius
    cover = (0.5 - distance / pixel).clamp(0, 1)[:, None]
    colour = torch.tensor([[c + s for c, s in zip(COLOURS[t.colour], t.shade)] for t in things], dtype=torch.float32)[:, :, None, None]
    if things[0].texture != "plain":
        light = (0.5 - torch.maximum(_pattern(things[0].texture, u, v), distance + OUTLINE) / pixel).clamp(0, 1)[:, None]
        colour = colour + LIGHT * light * (255 - colour)
    return canvas + cover * (colour - canvas)


def _paint_label(canvas: Tensor, scene: Scene, x: Tensor, y: Tensor, pixel: Tensor) -> Tensor:
    """Paints the white label with the scene's word on one picture (3, H, W)."""
    assert scene.word is not None
    thing, letters = scene.things[0], _word_mask(scene.word)
    half_height, half_width = LABEL_HEIGHT / 2, LABEL_HEIGHT / 2 * letters.shape[2] / letters.shape[1]
    centre_y = thing.y if scene.word_on_thing else thing.y + 1.25 * thing.radius + half_height
    u, v = (x - 0.5) / half_width, (y - centre_y) / half_height  # the label is in the middle of the picture's width
    cover = (0.5 - torch.maximum((u.abs() - 1) * half_width, (v.abs() - 1) * half_height) / pixel).clamp(0, 1)
    scale = max(1, round(96 * float(pixel) / LABEL_HEIGHT))  # average the letters down to the pixel, so that they do not alias
    small = F.avg_pool2d(letters, scale) if scale > 1 else letters
    ink = F.grid_sample(small[None], torch.stack([u, v], dim=-1)[None], align_corners=False)[0]
    paper = 255.0 * (1 - ink)
    return canvas + cover * (paper - canvas)


def render(scenes: list[Scene], size: int, windows: np.ndarray | None = None) -> np.ndarray:
    """Draws scenes as uint8 (B, size, size, 3).

    `windows` (B, 3) holds the left, the top and the side of the part that is drawn, as shares of the picture; without it, all of it.
    """
    if windows is None:
        windows = np.tile(np.array([0.0, 0.0, 1.0]), (len(scenes), 1))
    pictures = np.empty((len(scenes), size, size, 3), np.uint8)
    chunk = max(1, 2_000_000 // (size * size))
    for start in range(0, len(scenes), chunk):
        part = scenes[start : start + chunk]
        pictures[start : start + chunk] = _render(part, size, torch.from_numpy(windows[start : start + chunk]).float())
    return pictures


def _render(scenes: list[Scene], size: int, windows: Tensor) -> np.ndarray:
    steps = (torch.arange(size) + 0.5) / size
    x = windows[:, 0, None, None] + windows[:, 2, None, None] * steps[None, None, :]
    y = windows[:, 1, None, None] + windows[:, 2, None, None] * steps[None, :, None]
    pixel = windows[:, 2, None, None] / size
    canvas = torch.tensor([BACKGROUNDS[s.background] for s in scenes], dtype=torch.float32)[:, :, None, None].repeat(1, 1, size, size)
    for layer in range(max(len(s.things) for s in scenes)):  # the last thing lies lowest: what is inside another is named first
        groups: dict[tuple[str, str], list[int]] = {}
        for i, scene in enumerate(scenes):
            if layer < len(scene.things):
                thing = scene.things[-1 - layer]
                groups.setdefault((thing.shape, thing.texture), []).append(i)
        for members in groups.values():
            rows = torch.tensor(members)
            canvas[rows] = _paint_thing(canvas[rows], [scenes[m].things[-1 - layer] for m in members], x[rows], y[rows], pixel[rows])
    for i, scene in enumerate(scenes):
        if scene.word:
            canvas[i] = _paint_label(canvas[i], scene, x[i].expand(size, size), y[i].expand(size, size), pixel[i])
    return rearrange(canvas.clamp(0, 255).round().byte(), "b c h w -> b h w c").numpy()
