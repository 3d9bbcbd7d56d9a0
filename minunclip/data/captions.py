"""Captions of the captioned world: a grammar that writes them, a parser that reads them back, and the exact check against a scene.

A caption is true of its scene but seldom tells all: rotation, shade and layout are never said; size, texture, colour, background,
position and even the second thing often are not. Each scene gets several captions, from terse to full.
"""

import itertools
import re
from dataclasses import dataclass, field

import numpy as np

from minunclip.data.scenes import BACKGROUNDS, COLOURS, OPPOSITE, POSITIONS, SHAPES, SIZES, TEXTURES, Scene, Thing, holds, is_held_out

SYNONYMS = {  # what each word of the world may also be called; the first is the plainest
    "circle": ("circle", "disc", "round"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "ring": ("ring", "hoop", "donut"),
    "cross": ("cross", "plus"),
    "diamond": ("diamond", "rhombus"),
    "red": ("red", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green",),
    "teal": ("teal", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
    "brown": ("brown",),
    "black": ("black",),
    "plain": ("plain", "solid"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "chequered"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "inside": ("inside", "within"),
    "white": ("white",),
    "grey": ("grey", "gray"),
    "beige": ("beige", "sand"),
    "mint": ("mint",),
    "lavender": ("lavender", "lilac"),
    "sky": ("sky blue", "light blue"),
    "centre": ("centre", "middle", "center"),
}
COUNTS = {"two": 2, "three": 3}
GENERIC = ("shape", "thing", "figure", "shapes", "things", "figures")
PLURAL = {"cross": "crosses", "plus": "pluses", "box": "boxes", "rhombus": "rhombuses", "disc": "discs"}
ATTRIBUTES = ("shape", "colour", "texture", "size", "position", "relation", "count", "background", "word")
LEVELS = ("terse", "some", "most", "full")  # how much a caption says
KEEP = {"terse": 0.25, "some": 0.5, "most": 0.75, "full": 1.0}  # chance of each attribute to be said


def _plural(noun: str) -> str:
    return PLURAL.get(noun, noun + "s")


def caption(scene: Scene, level: str, rng: np.random.Generator, name_held_out: bool = False) -> str:
    """A random true caption of `scene`, in lower case. `level` is one of LEVELS; "full" says all that can be said.

    With `name_held_out` the caption always names the held-out combination of the scene, and so can never stand in training.
    """

    def say(word: str) -> str:
        options = SYNONYMS.get(word, (word,))
        return options[0] if rng.random() < 0.6 else options[rng.integers(len(options))]

    def keep(share: float = 1.0) -> bool:
        return level == "full" or rng.random() < KEEP[level] * share

    def noun_phrase(thing: Thing, count: int = 1) -> str:
        whole = name_held_out and is_held_out(thing.texture, thing.colour, thing.shape)
        shape = say(thing.shape) if whole or level == "full" or rng.random() < 0.5 + 0.5 * KEEP[level] else "shape"
        if shape == "round":
            shape = "disc"
        words = [
            say(thing.size) if keep() else "",
            say(thing.texture) if whole or keep() else "",
            say(thing.colour) if whole or keep(1.5) else "",
            _plural(shape) if count > 1 else shape,
        ]
        phrase = " ".join(w for w in words if w)
        if count > 1:
            return f"{next(name for name, n in COUNTS.items() if n == count)} {phrase}"
        return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"

    things = list(scene.things)
    if scene.relation is None:
        text = noun_phrase(things[0], len(things))
        if len(things) == 1 and scene.word is None and keep(0.9):
            position = things[0].position
            text += f" in the {say(position)}" if position == "centre" else f" at the {position}"
    else:
        relation = scene.relation
        if relation in OPPOSITE and rng.random() < 0.5:
            things, relation = things[::-1], OPPOSITE[relation]
        named = [is_held_out(t.texture, t.colour, t.shape) for t in things]
        if level == "terse" and rng.random() < 0.5:  # only one of the two
            text = noun_phrase(things[named.index(True) if name_held_out else rng.integers(2)])
        else:
            text = noun_phrase(things[0]) + (f" {say(relation)} " if keep(1.3) else " and ") + noun_phrase(things[1])
    if scene.word is not None and keep(1.5):
        text += f" with the word {scene.word} " + ("on it" if scene.word_on_thing else "below it")
    if keep(0.9):
        where = ("on a", "against a", "in front of a")[rng.integers(3)]
        text += f" {where} {say(scene.background)} background"
    return text


def _sayable() -> frozenset[str]:
    names = (*SHAPES, *COLOURS, *TEXTURES, *SIZES, *BACKGROUNDS, *OPPOSITE, "inside", "centre")
    said = [word for name in names for word in SYNONYMS.get(name, (name,)) if word != "round"]
    said += [_plural(word) for shape in (*SHAPES, "shape") for word in SYNONYMS.get(shape, (shape,)) if word != "round"]
    said += [*POSITIONS, *COUNTS]
    said += ["a an and at the in the on a against a in front of a background with the word on it below it"]
    return frozenset(" ".join(said).split()) | {"shape"}


SAYABLE = _sayable()  # every word that a caption of the grammar may hold


def never_said(text: str) -> list[str]:
    """The words of a text, and signs such as emoji, that stand in no caption of the grammar, and that no model has read, therefore."""
    return [word for word in dict.fromkeys(re.findall(r"\w+|[^\w\s\x00-\x7f]", text.lower())) if word not in SAYABLE]


@dataclass(frozen=True)
class Wanted:
    """One thing that a caption asks for; None where it does not say."""

    shape: str | None = None
    colour: str | None = None
    texture: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Description:
    """What a caption says. `unknown` are its words that the world has no meaning for."""

    things: tuple[Wanted, ...] = ()
    count: int | None = None
    relation: str | None = None
    position: str | None = None
    background: str | None = None
    word: str | None = None
    unknown: tuple[str, ...] = ()


def _spellings(names: tuple[str, ...]) -> dict[str, str]:
    """Every way to write each name, to the name; plurals too."""
    return {form: name for name in names for word in SYNONYMS.get(name, (name,)) for form in (word, _plural(word))}


_SHAPE, _COLOUR, _TEXTURE, _SIZE = (_spellings(names) for names in (SHAPES, tuple(COLOURS), TEXTURES, SIZES))
_RELATION = {**_spellings(tuple(OPPOSITE) + ("inside",)), "on top of": "above", "beneath": "below", "in": "inside"}
_POSITION = {**{name: name for name in POSITIONS}, **{word: "centre" for word in SYNONYMS["centre"]}, "upper left": "top left"}
_BACKGROUND = {**_spellings(tuple(BACKGROUNDS)), **{name: name for name in BACKGROUNDS}}
_FILLER = {"a", "an", "the", "of", "and", "with", "picture", "photo", "image", "is", "one", "single", "coloured", "colored", "at", "in", "on", "it", *GENERIC}


def _alternatives(words: dict[str, str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_WORD_PHRASE = re.compile(r"\b(?:with )?the word \"?'?(\w+)\"?'?(?: written)?(?: (?:on|below|beside) it)?")
_BACKGROUND_PHRASE = re.compile(rf"\b(?:on|against|in front of|over)? ?an? ({_alternatives(_BACKGROUND)}) (?:background|backdrop)\b")
# what follows must not make it part of another phrase, as in "on the left of a square" or "at the top left"
_OF_IT = r" of the (?:picture|image|photo)\b"
_POSITION_PHRASE = re.compile(
    rf"\b(?:in|at|on) the ({_alternatives(_POSITION)})\b(?: corner| side| edge)?(?:{_OF_IT})?(?! of\b| left\b| right\b| corner\b| side\b| edge\b)"
)
_RELATION_PHRASE = re.compile(rf"\b({_alternatives(_RELATION)})\b(?: of)?")


def parse(text: str) -> Description:
    """Reads a caption: the inverse of the grammar, and lenient with words that it does not know (they are listed)."""
    rest = " ".join(text.lower().replace(",", " ").replace(".", " ").split())
    found: dict[str, str] = {}
    for name, pattern, meaning in (
        ("word", _WORD_PHRASE, None),
        ("background", _BACKGROUND_PHRASE, _BACKGROUND),
        ("position", _POSITION_PHRASE, _POSITION),
    ):
        match = pattern.search(rest)
        if match:
            found[name] = meaning[match[1]] if meaning else match[1]
            rest = rest[: match.start()] + " " + rest[match.end() :]
    match = _RELATION_PHRASE.search(rest)
    parts = re.split(r"\band\b", rest, maxsplit=1)
    relation = None
    if match and rest[: match.start()].strip() and rest[match.end() :].strip():
        relation, parts = _RELATION[match[1]], [rest[: match.start()], rest[match.end() :]]
    things: list[Wanted] = []
    count, unknown = None, []
    for part in parts:
        wanted: dict[str, str] = {}
        many, before, words = 1, len(things), re.findall(r"[^\W_]+", part)
        for word in words:
            kind = next((k for k, known in (("shape", _SHAPE), ("colour", _COLOUR), ("texture", _TEXTURE), ("size", _SIZE)) if word in known), None)
            if kind in wanted or (word in COUNTS and "shape" in wanted):  # a next thing, without an "and"
                things += [Wanted(**wanted)] * many
                wanted, many = {}, 1
            if kind:
                wanted[kind] = {"shape": _SHAPE, "colour": _COLOUR, "texture": _TEXTURE, "size": _SIZE}[kind][word]
            elif word in COUNTS:
                many = COUNTS[word]
            elif word not in _FILLER:
                unknown.append(word)
        if wanted or many > 1 or any(word in GENERIC for word in words):
            things += [Wanted(**wanted)] * many
        if many > 1 and len(parts) == 1 and len(things) == before + many:
            count = many
    things = things[:3]
    if len(things) != 2:
        relation = None
    return Description(tuple(things), count, relation, unknown=tuple(unknown), **found)


@dataclass
class Report:
    """How a picture answers its caption: for each attribute that was asked, how many mentions came out right."""

    right: dict[str, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)

    @property
    def all_right(self) -> bool:
        """Everything that the caption names is right; written words are left out, as they are reported apart."""
        return all(self.right[a] == n for a, n in self.asked.items() if a != "word")

    def __str__(self) -> str:
        parts = [f"{a} {'right' if self.right[a] == n else f'{self.right[a]} of {n} right'}" for a, n in self.asked.items()]
        return ", ".join(parts) or "the caption asks for nothing that can be checked"


def compare(description: Description, scene: Scene) -> Report:
    """Holds a description against a scene, exactly; the things are matched up in the way that makes most mentions right."""
    wanted = description.things
    best: tuple[int, dict[str, int]] = (-1, {})
    places: list[Thing | None] = [*scene.things, *[None] * max(0, len(wanted) - len(scene.things))]
    for chosen in itertools.permutations(places, len(wanted)):
        right = {a: 0 for a in ("shape", "colour", "texture", "size", "position", "relation")}
        for want, thing in zip(wanted, chosen):
            for attribute in ("shape", "colour", "texture", "size"):
                asked = getattr(want, attribute)
                right[attribute] += asked is not None and thing is not None and asked == getattr(thing, attribute)
        if description.relation and chosen[0] and chosen[1]:
            right["relation"] = int(holds(description.relation, chosen[0], chosen[1]))
        if description.position and chosen and chosen[0]:
            right["position"] = int(chosen[0].position == description.position)
        if sum(right.values()) > best[0]:
            best = (sum(right.values()), right)
    report = Report()
    for attribute in ("shape", "colour", "texture", "size"):
        asked = sum(getattr(want, attribute) is not None for want in wanted)
        if asked:
            report.asked[attribute], report.right[attribute] = asked, best[1][attribute]
    for attribute in ("position", "relation"):
        if getattr(description, attribute):
            report.asked[attribute], report.right[attribute] = 1, best[1][attribute]
    for attribute, seen in (("count", len(scene.things)), ("background", scene.background), ("word", scene.word)):
        if getattr(description, attribute) is not None:
            report.asked[attribute], report.right[attribute] = 1, int(getattr(description, attribute) == seen)
    return report


def describes(text: str, scene: Scene) -> bool:
    """Whether a caption is true of a scene: every attribute, written words included."""
    report = compare(parse(text), scene)
    return all(report.right[a] == n for a, n in report.asked.items()) and len(parse(text).things) <= len(scene.things)
