import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minunclip.data.captions import LEVELS, SAYABLE, Description, Wanted, caption, compare, describes, never_said, parse
from minunclip.data.scenes import BACKGROUNDS, COLOURS, OPPOSITE, SHAPES, SIZES, TEXTURES, Scene, Thing, edit, is_held_out, sample_scenes

SCENES = {False: sample_scenes(300, seed=1), True: sample_scenes(300, seed=1, held_out=True)}
scenes = st.sampled_from(SCENES[False] + SCENES[True])
seeds = st.integers(0, 2**32)


def thing(words: str, x: float = 0.5, y: float = 0.5) -> Thing:
    size, texture, colour, shape = words.split()
    return Thing(shape, colour, texture, size, x, y, 0.15, 0.0, (0.0, 0.0, 0.0))


CIRCLE, SQUARE = thing("large plain red circle", x=0.25), thing("small dotted blue square", x=0.75)
PAIR = Scene((CIRCLE, SQUARE), "white", "left of")


def wanted(thing: Thing) -> Wanted:
    return Wanted(thing.shape, thing.colour, thing.texture, thing.size)


def says_everything(scene: Scene) -> list[Description]:
    """What a full caption may be read as: two things can be named in either order."""
    things = tuple(map(wanted, scene.things))
    one = len(things) == 1 and scene.word is None
    rest = {"background": scene.background, "word": scene.word, "position": scene.things[0].position if one else None}
    if scene.relation is None:
        return [Description(things, len(things) if len(things) > 1 else None, **rest)]
    either = [Description(things, relation=scene.relation, **rest)]
    return either + ([Description(things[::-1], relation=OPPOSITE[scene.relation], **rest)] if scene.relation in OPPOSITE else [])


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_captions_are_true_and_wholly_understood(level: str, held_out: bool) -> None:
    rng = np.random.default_rng(0)
    for scene in SCENES[held_out]:
        text = caption(scene, level, rng)
        assert describes(text, scene), text
        assert not parse(text).unknown and parse(text).things, text


@settings(max_examples=200, deadline=None)
@given(scenes, seeds)
def test_a_full_caption_says_everything_and_parse_inverts_it(scene: Scene, seed: int) -> None:
    text = caption(scene, "full", np.random.default_rng(seed))
    assert parse(text) in says_everything(scene), text


@settings(max_examples=200, deadline=None)
@given(scenes, seeds, st.sampled_from([("colour", tuple(COLOURS)), ("shape", SHAPES), ("texture", TEXTURES), ("size", SIZES)]), st.integers(1, 9))
def test_a_full_caption_is_false_of_any_other_first_thing(scene: Scene, seed: int, attribute: tuple[str, tuple[str, ...]], turn: int) -> None:
    name, values = attribute
    old = getattr(scene.things[0], name)
    new = values[(values.index(old) + 1 + turn % (len(values) - 1)) % len(values)]
    text = caption(scene, "full", np.random.default_rng(seed))
    assert describes(text, scene) and describes(text, edit(scene, **{name: new})) == (new == old), text


def test_terser_captions_say_less() -> None:
    rng = np.random.default_rng(0)
    asked = [sum(sum(compare(parse(caption(s, level, rng)), s).asked.values()) for s in SCENES[False]) for level in LEVELS]
    assert asked == sorted(asked) and asked[0] < 0.6 * asked[-1]


@pytest.mark.parametrize("level", LEVELS)
def test_a_held_out_combination_is_named_on_demand(level: str) -> None:
    rng = np.random.default_rng(0)
    for scene in SCENES[True]:
        text = caption(scene, level, rng, name_held_out=True)
        named = [w for w in parse(text).things if w.texture and w.colour and w.shape]
        assert any(is_held_out(w.texture, w.colour, w.shape) for w in named), text
        assert describes(text, scene)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", Description()),
        ("   .,. ", Description()),
        ("zwölf 🐘 elephants", Description(unknown=("zwölf", "elephants"))),
        ("A Red CIRCLE.", Description((Wanted("circle", "red"),))),
        ("a photo of a shiny golden donut", Description((Wanted("ring", "yellow"),), unknown=("shiny",))),
        ("three stripy boxes", Description((Wanted("square", texture="striped"),) * 3, 3)),
        ("a star to the left of a tiny thing", Description((Wanted("star"), Wanted(size="small")), relation="left of")),
        ("a star and a heart on a light blue background", Description((Wanted("star"), Wanted("heart")), background="sky")),
        ("a disc in the middle", Description((Wanted("circle"),), position="centre")),
        ("a disc in the middle of the photo", Description((Wanted("circle"),), position="centre")),
        ("a red disc at the top left of the picture", Description((Wanted("circle", "red"),), position="top left")),
        ("a red disc in the top left corner of the image", Description((Wanted("circle", "red"),), position="top left")),
        ("a star on the left of a square", Description((Wanted("star"), Wanted("square")), relation="left of")),
        ('a cross with the word "star" on it', Description((Wanted("cross"),), word="star")),
        ("red star, blue circle", Description((Wanted("star", "red"), Wanted("circle", "blue")))),
        ("a red star, two circles", Description((Wanted("star", "red"), Wanted("circle"), Wanted("circle")))),
        ("a circle on a square", Description((Wanted("circle"), Wanted("square")))),
        ("a red circle above", Description((Wanted("circle", "red"),), unknown=("above",))),
    ],
)
def test_reading_odd_captions(text: str, expected: Description) -> None:
    assert parse(text) == expected


def test_sayable_words_are_those_of_captions() -> None:
    """All of them, and no others: what is left out of it is warned of."""
    rng = np.random.default_rng(3)
    said = {word for scene in sample_scenes(6000, 4) for level in LEVELS for word in caption(scene, level, rng).split()}
    assert said == SAYABLE
    assert never_said("A red Circle beneath a photo of 🐘, round; with the word hello on it") == ["beneath", "photo", "🐘", "round", "hello"]


@given(st.text(max_size=60))
def test_any_text_can_be_read(text: str) -> None:
    description = parse(text)
    assert len(description.things) <= 3
    compare(description, PAIR)


@pytest.mark.parametrize(
    "text, scene, right, asked",
    [
        ("a red circle left of a blue square", PAIR, {"shape": 2, "colour": 2, "relation": 1}, {"shape": 2, "colour": 2, "relation": 1}),
        ("a blue square right of a red circle", PAIR, {"shape": 2, "colour": 2, "relation": 1}, {"shape": 2, "colour": 2, "relation": 1}),
        ("a red circle above a blue square", PAIR, {"shape": 2, "colour": 2, "relation": 0}, {"shape": 2, "colour": 2, "relation": 1}),
        ("a red circle right of a blue square", PAIR, {"shape": 2, "colour": 2, "relation": 0}, {"shape": 2, "colour": 2, "relation": 1}),
        # bound the wrong way round: either the colours are right or the shapes, and the best match is reported
        ("a blue circle and a red square", PAIR, {"shape": 2, "colour": 0}, {"shape": 2, "colour": 2}),
        ("two red circles", PAIR, {"shape": 1, "colour": 1, "count": 1}, {"shape": 2, "colour": 2, "count": 1}),
        ("two circles", Scene((CIRCLE,), "grey"), {"shape": 1, "count": 0}, {"shape": 2, "count": 1}),
        ("two circles", Scene((CIRCLE,) * 3, "grey"), {"shape": 2, "count": 0}, {"shape": 2, "count": 1}),
        ("a circle at the left", Scene((CIRCLE,), "grey"), {"shape": 1, "position": 1}, {"shape": 1, "position": 1}),
        ("a circle at the top", Scene((CIRCLE,), "grey"), {"shape": 1, "position": 0}, {"shape": 1, "position": 1}),
        ("a circle on a white background", Scene((CIRCLE,), "grey"), {"shape": 1, "background": 0}, {"shape": 1, "background": 1}),
        ("a circle with the word star on it", Scene((CIRCLE,), "grey", word="heart"), {"shape": 1, "word": 0}, {"shape": 1, "word": 1}),
        ("a shape", PAIR, {}, {}),
    ],
)
def test_compare_counts_what_is_right(text: str, scene: Scene, right: dict, asked: dict) -> None:
    report = compare(parse(text), scene)
    assert report.asked == asked
    if text == "a blue circle and a red square":
        assert sum(report.right.values()) == 2
    else:
        assert report.right == right
    assert describes(text, scene) == (right == asked) and report.all_right == all(right[a] == n for a, n in asked.items() if a != "word")


def test_the_report_reads_well() -> None:
    assert str(compare(parse("two red circles"), PAIR)) == "shape 1 of 2 right, colour 1 of 2 right, count right"
    assert str(compare(parse(""), PAIR)) == "the caption asks for nothing that can be checked"
    assert not describes("three shapes", PAIR) and not describes("a circle and a square", Scene((CIRCLE,), "white"))


def test_every_background_is_read_by_its_own_name_too() -> None:
    for name in BACKGROUNDS:
        assert parse(f"a red star on a {name} background").background == name
