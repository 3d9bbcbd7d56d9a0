"""The captioned world: scenes that can be drawn at any size, and captions that are true of them and can be checked.

The paper trains on some 650 million captioned pictures. Here a scene is data: one to three things, each with a shape, colour,
texture and size, on a background, sometimes with a written label. Captions (data/captions.py) leave much unsaid, so that one
caption has many right pictures and the prior of section 2.2 has something to do. A fixed set of combinations
(texture, colour, shape), such as "striped purple star", is held out: no training scene has one, every held-out scene has.

Coordinates run from 0 to 1, x to the right and y downwards; lengths are shares of the picture's side, angles are radians.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
COLOURS = {  # red, green, blue: 0 .. 255
    "red": (214, 36, 36),
    "orange": (245, 130, 20),
    "yellow": (250, 212, 20),
    "green": (36, 150, 60),
    "teal": (20, 180, 184),
    "blue": (40, 80, 214),
    "purple": (124, 48, 172),
    "pink": (246, 110, 182),
    "brown": (122, 72, 34),
    "black": (24, 24, 28),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "grey": (165, 165, 165),
    "beige": (235, 214, 172),
    "mint": (178, 236, 200),
    "lavender": (206, 190, 246),
    "sky": (168, 214, 250),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below", "inside")
NESTED = "one inside another"
KINDS = ("one thing", "things alike", "two side by side", NESTED)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
POSITIONS = {  # column and row of a three by three grid
    "top left": (0, 0),
    "top": (1, 0),
    "top right": (2, 0),
    "left": (0, 1),
    "centre": (1, 1),
    "right": (2, 1),
    "bottom left": (0, 2),
    "bottom": (1, 2),
    "bottom right": (2, 2),
}
CELLS = (0.27, 0.5, 0.73)  # centres of the grid's columns and rows
RADIUS = {"small": (0.14, 0.155), "large": (0.21, 0.235)}
OUTER_RADIUS = (0.32, 0.36)  # of a large thing that holds a small one
HOLDERS = ("circle", "square", "heart", "diamond")  # shapes that have room for another inside


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    rotation: float  # never said in a caption
    shade: tuple[float, float, float]  # added to the colour, never said

    @property
    def position(self) -> str:
        """The cell of the three by three grid in which the thing's centre lies."""
        column, row = (min(range(3), key=lambda i: abs(CELLS[i] - c)) for c in (self.x, self.y))
        return next(name for name, cell in POSITIONS.items() if cell == (column, row))


@dataclass(frozen=True)
class Scene:
    """One picture. `relation` holds from the first thing to the second; several things without one are all alike."""

    things: tuple[Thing, ...]
    background: str
    relation: str | None = None
    word: str | None = None  # written on a label, on the thing or below it
    word_on_thing: bool = False


def is_held_out(texture: str, colour: str, shape: str) -> bool:
    """True for 32 of the 320 combinations: one colour for each texture and shape, "striped purple star" among them."""
    return (list(COLOURS).index(colour) + 3 * SHAPES.index(shape) + 7 * TEXTURES.index(texture)) % 10 == 2


def _kind(rng: np.random.Generator, held_out: bool) -> dict[str, str]:
    """A random shape, colour and texture, from the combinations held out or from all the others."""
    while True:
        kind = {
            "shape": SHAPES[rng.integers(len(SHAPES))],
            "colour": tuple(COLOURS)[rng.integers(len(COLOURS))],
            "texture": TEXTURES[rng.integers(len(TEXTURES))],
        }
        if is_held_out(kind["texture"], kind["colour"], kind["shape"]) == held_out:
            return kind


def _two_kinds(rng: np.random.Generator, held_out: bool, relation: str) -> list[dict[str, str]]:
    """Two different kinds, in random order; with `held_out` at least one of them is a held-out combination."""
    while True:
        kinds = [_kind(rng, held_out), _kind(rng, held_out and rng.random() < 0.2)]
        kinds = kinds if rng.integers(2) else kinds[::-1]
        fits = kinds[1]["shape"] in HOLDERS and kinds[0]["colour"] != kinds[1]["colour"]
        if kinds[0] != kinds[1] and (relation != "inside" or fits):
            return kinds


def _thing(rng: np.random.Generator, kind: dict[str, str], size: str, x: float, y: float, radius: float | None = None) -> Thing:
    return Thing(
        **kind,
        size=size,
        x=x,
        y=y,
        radius=rng.uniform(*RADIUS[size]) if radius is None else radius,
        rotation=rng.uniform(-0.26, 0.26),
        shade=tuple(rng.uniform(-12, 12, 3)),
    )


def _layout(rng: np.random.Generator, count: int, size: str) -> list[tuple[float, float]]:
    """Centres for two or three things that are alike: what a caption never says."""
    far = rng.uniform(0.235, 0.255)
    options: list[list[tuple[float, float]]]
    if count == 2:
        options = [[(-far, 0), (far, 0)], [(0, -far), (0, far)], [(-far, -far), (far, far)], [(-far, far), (far, -far)]]
    else:
        options = [[(-far, far), (far, far), (0, -far)], [(-far, -far), (far, -far), (0, far)]]
        if size == "small":
            options += [[(-0.32, 0), (0, 0), (0.32, 0)], [(0, -0.32), (0, 0), (0, 0.32)]]
    shift = rng.uniform(-0.02, 0.02, 2)
    return [(0.5 + x + shift[0], 0.5 + y + shift[1]) for x, y in options[rng.integers(len(options))]]


def sample_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """A random scene. With `held_out`, at least one thing is of a combination that no training scene shows."""
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    size = SIZES[rng.integers(2)]
    kind = _kind(rng, held_out)
    what = rng.choice(["one", "word", "pair", "alike"], p=[0.3, 0.08, 0.36, 0.26])
    if what == "one":
        x, y = (CELLS[rng.integers(3)] + rng.uniform(-0.04, 0.04) for _ in range(2))
        return Scene((_thing(rng, kind, size, x, y),), background)
    if what == "word":  # the label needs room: a large thing, in the middle or above it
        on_thing = bool(rng.integers(2))
        thing = _thing(rng, kind, "large", 0.5 + rng.uniform(-0.04, 0.04), (0.5 if on_thing else 0.36) + rng.uniform(-0.04, 0.04))
        return Scene((thing,), background, word=SHAPES[rng.integers(len(SHAPES))], word_on_thing=on_thing)
    if what == "alike":
        count = int(rng.integers(2, 4))
        return Scene(tuple(_thing(rng, kind, size, x, y) for x, y in _layout(rng, count, size)), background)
    relation = RELATIONS[rng.integers(len(RELATIONS))]
    first_kind, second_kind = _two_kinds(rng, held_out, relation)
    if relation == "inside":
        x, y = 0.5 + rng.uniform(-0.05, 0.05, 2)
        outer = _thing(rng, second_kind, "large", x, y, rng.uniform(*OUTER_RADIUS))
        inner = _thing(rng, first_kind, "small", x, y)
        return Scene((inner, outer), background, relation)
    along, across = rng.uniform(0.235, 0.255), rng.uniform(-0.06, 0.06)
    angle = {"left of": math.pi, "right of": 0.0, "above": -math.pi / 2, "below": math.pi / 2}[relation]
    dx, dy = along * math.cos(angle) - across * math.sin(angle), along * math.sin(angle) + across * math.cos(angle)
    first = _thing(rng, first_kind, size, 0.5 + dx, 0.5 + dy)
    second = _thing(rng, second_kind, SIZES[rng.integers(2)], 0.5 - dx, 0.5 - dy)
    return Scene((first, second), background, relation)


def twin(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene but for one thing that a caption may say: a pair changes places, or one thing, or all that are alike, its shape, texture or colour.

    Beside its twin a picture cannot be told by its colours and background alone. CLIP needs such neighbours to learn shapes and who is
    where (Yuksekgonul et al. 2023): among random scenes it need not. A twin of a training scene is a training scene: nothing held out.
    """
    if scene.relation in OPPOSITE and rng.random() < 0.5:
        first, second = scene.things
        return replace(scene, things=(replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y)), relation=OPPOSITE[scene.relation])
    while True:
        attribute, values = (("shape", SHAPES), ("shape", SHAPES), ("texture", TEXTURES), ("colour", tuple(COLOURS)))[rng.integers(4)]
        new: dict[str, Any] = {attribute: values[rng.integers(len(values))]}
        changed = replace(scene.things[0], **new)
        alike = scene.relation is None
        fits = scene.relation != "inside" or changed.colour != scene.things[1].colour
        others = tuple(replace(t, **new) if alike else t for t in scene.things[1:])
        if changed != scene.things[0] and fits and not is_held_out(changed.texture, changed.colour, changed.shape):
            return replace(scene, things=(changed, *others))


def sample_scenes(count: int, seed: int, held_out: bool = False) -> list[Scene]:
    """`count` random scenes; the same seed gives the same scenes. Training uses held_out=False, evaluation True."""
    rng = np.random.default_rng([seed, int(held_out)])
    return [sample_scene(rng, held_out) for _ in range(count)]


def kind_of(scene: Scene) -> str:
    """Which of KINDS a scene is. The last is the rarest, one of fourteen, and the hardest to draw."""
    if scene.relation is None:
        return KINDS[0] if len(scene.things) == 1 else KINDS[1]
    return NESTED if scene.relation == "inside" else KINDS[2]


def holds(relation: str, first: Thing, second: Thing) -> bool:
    """Whether `first` stands in `relation` to `second`, read off their centres."""
    dx, dy = first.x - second.x, first.y - second.y
    if math.hypot(dx, dy) < 0.16:
        return relation == "inside" and first.size == "small"
    direction = ("left of" if dx < 0 else "right of") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
    return relation == direction


def edit(scene: Scene, **changes: Any) -> Scene:
    """The same scene with attributes of its first thing changed, such as colour="blue"."""
    return replace(scene, things=(replace(scene.things[0], **changes), *scene.things[1:]))
