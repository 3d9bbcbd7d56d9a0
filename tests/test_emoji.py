"""The system's emoji as a captioned set: against the font, the emoji package and Unicode's own grouping. Without a font only the errors are tested."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minunclip.cli import main
from minunclip.config import TINY
from minunclip.data import emoji as module
from minunclip.data.collection import build_collection
from minunclip.data.emoji import FONTS, base_emoji, build_emoji, draw_emoji, find_font, read_keywords

FONT = next((name for name in FONTS if Path(name).is_file()), None)
needs_font = pytest.mark.skipif(FONT is None, reason="no colour emoji font on this machine")


def test_what_differs_in_skin_gender_hair_or_direction_has_one_base() -> None:
    alike = [
        "👋 👋🏻 👋🏿",
        "🧑‍🚀 👩‍🚀 👨🏾‍🚀",
        "🏃 🏃🏽‍♀️ 🏃‍♂️‍➡️",
        "🧑 👩 👨‍🦰 👩🏽‍🦳",
        "👪 👨‍👩‍👧‍👦 👩‍👦",
        "💑 👩‍❤️‍👨 🧑🏻‍❤️‍🧑🏿",
        "👭 👫🏽 🧑🏻‍🤝‍🧑🏾",
        "❤️ ❤",
        "🤴 👸🏿 🫅",
    ]
    bases = [{base_emoji(character) for character in row.split()} for row in alike]
    assert [len(row) for row in bases] == [1] * len(alike) and len(set.union(*bases)) == len(alike)
    alone = "😀 😁 🏳️‍🌈 🏴‍☠️ 🇫🇷 🇩🇪 ♀️ ➡️ 💏 🧑‍🍳".split()  # two flags of a kind, and signs that are dress elsewhere
    assert len({base_emoji(character) for character in alone}) == len(alone) and all(base_emoji(character) for character in alone)


@needs_font
def test_an_emoji_is_drawn_in_colour_or_not_at_all() -> None:
    font = find_font()
    drawn = draw_emoji("🍅", font)
    assert drawn is not None and drawn.width == drawn.height
    pixels = np.asarray(drawn).astype(int)
    assert (pixels[0, 0] == 255).all() and pixels[..., 0][pixels.min(axis=2) < 128].mean() > 150  # a red thing on white
    assert draw_emoji("\U0010fffd", font) is None  # nobody draws a private character
    assert draw_emoji("😀😀", font) is None  # two pieces


@needs_font
@pytest.mark.slow
def test_the_set_is_whole_and_its_split_keeps_bases_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    emoji = pytest.importorskip("emoji")
    folder = tmp_path / "set"
    count = build_emoji(folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert count == len(rows) > 3000 and len({row["file_name"] for row in rows}) == count
    by_name = {row["file_name"]: row for row in rows}
    assert {"grinning face", "grinning"} <= set(by_name["1f600.png"]["text"]) and by_name["1f44b-1f3fe.png"]["group"] == "👋"
    named = {names["en"].strip(":").replace("_", " ") for names in emoji.EMOJI_DATA.values()}
    assert all(row["text"][0] in named for row in rows)
    if read_keywords():
        assert any("wave" in caption for caption in by_name["1f44b.png"]["text"])
    assert Image.open(folder / "1f600.png").mode == "RGB"
    world = build_collection(TINY, folder, tmp_path / "data")
    assert world.held is not None and len(world) + len(world.held["pictures"]) == count
    # oracle: the groups of the list, by the captions that stand in the arrays
    group_of: dict[str, set[str]] = {}
    for row in rows:
        group_of.setdefault(" ".join(row["text"][0].split())[:20], set()).add(row["group"])

    def groups(captions: np.ndarray) -> set[str]:
        texts = [world.tokenizer.decode([t for t in row[0].tolist() if t > 1])[:20] for row in captions]
        return {next(iter(found)) for text in texts if len(found := group_of.get(text, set())) == 1}

    learned, held = groups(world.captions), groups(world.held["captions"])
    assert len(held) > 50 and not learned & held
    assert main(["data", "emoji", "--out", str(folder)]) == 2 and "not empty" in capsys.readouterr().err


def test_without_a_font_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("emoji")
    for fonts, options, part in (((), [], "install one"), (FONTS, ["--font", __file__], "no font that can be used")):
        monkeypatch.setattr(module, "FONTS", fonts)
        assert main(["data", "emoji", "--out", str(tmp_path / "set"), *options]) == 2
        error = capsys.readouterr().err
        assert part in error and len(error.splitlines()) == 1 and not (tmp_path / "set").exists()


def test_keywords_are_read_from_both_files_of_cldr(tmp_path: Path) -> None:
    assert read_keywords(tmp_path) == {}
    for part, note in (
        ("annotations", '<annotation cp="👋">hand | wave</annotation><annotation cp="👋" type="tts">waving hand</annotation>'),
        ("annotationsDerived", ""),
    ):
        (tmp_path / part).mkdir()
        (tmp_path / part / "en.xml").write_text(f"<ldml><annotations>{note}</annotations></ldml>", encoding="utf-8")
    assert read_keywords(tmp_path) == {"👋": ["hand", "wave"]}
