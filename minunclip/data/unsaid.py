"""What no caption says: a thing's exact place, its rotation and shade. Drawn anew, and, of lone things, read off pictures by drawing the thing again.

Section 3.1 of the paper asks what varies in variations; this measures it, without a network.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor

from minunclip.data.render import render
from minunclip.data.scenes import BACKGROUNDS, CELLS, POSITIONS, RADIUS, Scene, Thing, edit

ANGLES = np.linspace(-0.45, 0.45, 19).tolist()  # radians, at which a thing is tried; the world turns things by at most 0.26


def another(scene: Scene, rng: np.random.Generator) -> Scene:
    """Another scene that the same captions fit: things turned and shaded anew; one that is alone, without a word, also moved in its cell of the grid,
    and of another radius.
    """

    def anew(thing: Thing) -> Thing:
        return replace(thing, rotation=rng.uniform(-0.26, 0.26), shade=tuple(rng.uniform(-12, 12, 3)))

    thing, *others = scene.things
    if others or scene.word is not None:  # there is no room
        return replace(scene, things=tuple(anew(one) for one in scene.things))
    x, y = (CELLS[k] + rng.uniform(-0.04, 0.04) for k in POSITIONS[thing.position])
    return replace(scene, things=(anew(replace(thing, x=x, y=y, radius=rng.uniform(*RADIUS[thing.size]))),))


def unsaid(images: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """What no caption says of pictures (B, 3, S, S), each of the one thing of a scene, but moved, turned or of another shade: (B, 6).

    Centre x and y, in shares of the side; rotation, in radians, NaN where it cannot be seen; red, green and blue of the shade, of 255. Found by drawing
    the thing again: where what is not background has its middle, as large as that is, at each of ANGLES, in the shade with the least square error.
    """
    pictures, side = (images.float().cpu() + 1) * 127.5, images.shape[-1]
    here = (torch.arange(side) + 0.5) / side

    def draw(things: Sequence[dict[str, Any]]) -> Tensor:
        return rearrange(torch.from_numpy(render([edit(scene, **thing) for scene, thing in zip(scenes, things)], side)).float(), "b h w c -> b c h w")

    def place(drawn: Tensor) -> tuple[Tensor, Tensor]:
        """The middle (B, 2) and the area (B,) of what is not background."""
        background = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], dtype=torch.float32)[:, :, None, None]
        weight = (drawn - background).abs().amax(dim=1)
        weight = weight * (weight > 25)  # of 255: what is less is noise on the background
        columns, rows = reduce(weight, "b h w -> b w", "sum"), reduce(weight, "b h w -> b h", "sum")
        area = columns.sum(dim=1).clamp(min=1e-6)
        return torch.stack([columns @ here, rows @ here], dim=1) / area[:, None], area

    (middle, area), known = place(pictures), [scene.things[0] for scene in scenes]
    found, least = torch.full((len(scenes), 6), math.nan), torch.full((len(scenes),), math.inf)
    for angle in ANGLES:
        things: list[dict[str, Any]] = [{"x": t.x, "y": t.y, "radius": t.radius, "rotation": angle, "shade": (0.0, 0.0, 0.0)} for t in known]
        for _ in range(2):  # a larger thing is larger on all sides, so its place is found again
            middle_drawn, area_drawn = place(draw(things))
            grown = (area / area_drawn).sqrt().clamp(0.8, 1.25).tolist()
            for thing, (x, y), factor in zip(things, (middle - middle_drawn).tolist(), grown):
                thing |= {"x": thing["x"] + x, "y": thing["y"] + y, "radius": thing["radius"] * factor}
        plain = draw(things)
        lit = (draw([{**thing, "shade": (20.0, 20.0, 20.0)} for thing in things]) - plain) / 20  # how far each pixel follows the shade
        shade = ((pictures - plain) * lit).sum(dim=(2, 3)) / lit.square().sum(dim=(2, 3)).clamp(min=1e-6)
        error = (pictures - plain - shade[:, :, None, None] * lit).square().mean(dim=(1, 2, 3))
        row = torch.cat([torch.tensor([[thing["x"], thing["y"], angle] for thing in things]), shade], dim=1)
        better = error < least
        found[better], least[better] = row[better], error[better]
    round_ones = [scene.things[0].shape in ("circle", "ring") and scene.things[0].texture == "plain" for scene in scenes]
    found[torch.tensor(round_ones), 2] = math.nan
    return found
