"""The system's colour emoji as a captioned set: about 3,700 real pictures with names, aliases and keywords, ready after some seconds.

Pictures come from the font, names and aliases from the `emoji` package, keywords from Unicode's CLDR where it is installed. What the font draws keeps
the font's licence (Noto: OFL). The paper trains on pictures of the web; this is the largest set of captioned pictures that a laptop already has.
"""

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, ImageDraw, ImageFont, features

FONTS = (  # where Debian and Ubuntu, Arch, Fedora, and macOS keep theirs
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
    "/System/Library/Fonts/Apple Color Emoji.ttc",
)
HEIGHTS = (109, 160, 96)  # fonts of bitmaps have few sizes: Noto's only one, and Apple's largest
KEYWORDS = Path("/usr/share/unicode/cldr/common")  # Debian's unicode-cldr-core
FULLY_QUALIFIED = 2  # the status of an emoji that is not a spelling variant of another
# What tells pictures of one base emoji apart: skin tones, variation selector, joiner, gender, hair, direction ...
DRESS = dict.fromkeys((*range(0x1F3FB, 0x1F400), 0xFE0F, 0x200D, 0x2640, 0x2642, *range(0x1F9B0, 0x1F9B4), 0x27A1))
# ... and people of either gender: adults, old ones, children, crowned heads, dancers, Father and Mother Christmas, couples, families
PEOPLE = str.maketrans(
    dict(zip("👨👩👴👵👦👧🤴👸🕺🎅🤶", "🧑🧑🧓🧓🧒🧒🫅🫅💃🧑🧑")) | dict(zip("👫👬👭👪💏💑", ("🧑🤝🧑", "🧑🤝🧑", "🧑🤝🧑", "🧑🧒", "🧑❤💋🧑", "🧑❤🧑")))
)


def base_emoji(character: str) -> str:
    """What an emoji is without skin tone, gender, hair and direction: pictures with the same base are too alike to train on one and test on another."""
    bare = character.translate(DRESS).translate(PEOPLE)
    return re.sub("^[🧑🧒]{2,}$", "🧑🧒", bare) or character  # every family is one base


def find_font(path: str | None = None) -> ImageFont.FreeTypeFont:
    """The emoji font at `path`, or the system's. ValueError says what to do where there is none, or none that can be used."""
    found = path or next((name for name in FONTS if Path(name).is_file()), None)
    if found is None:
        raise ValueError("no colour emoji font on this machine: install one (Debian and Ubuntu: fonts-noto-color-emoji) or give --font a file")
    if not features.check("raqm"):
        raise ValueError("Pillow has no raqm here, without which emoji of several characters fall apart: install libfribidi, or Pillow from its wheel")
    for height in HEIGHTS:
        try:
            return ImageFont.truetype(found, height)
        except OSError as error:
            reason = error
    raise ValueError(f"{found} is no font that can be used ({reason}): give --font a colour emoji font")


def draw_emoji(character: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """An emoji on a white square; None where the font lacks it, draws it in several pieces, or knows no colours."""
    width, height = (round(edge) for edge in font.getbbox("😀")[2:])
    if round(font.getbbox(character)[2]) > width:
        return None
    side = max(width, height)
    picture = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(picture).text(((side - width) // 2, (side - height) // 2), character, font=font, embedded_color=True, fill="white")
    return picture if picture.getcolors(1) is None else None


def read_keywords(folder: Path = KEYWORDS) -> dict[str, list[str]]:
    """CLDR's English keywords by emoji, without variation selectors; empty where CLDR is not installed."""
    keywords = {}
    for path in (folder / part / "en.xml" for part in ("annotations", "annotationsDerived")):
        for note in ElementTree.parse(path).iter("annotation") if path.is_file() else ():
            if "type" not in note.attrib and note.text:
                keywords[note.attrib["cp"]] = [word.strip() for word in note.text.split("|")]
    return keywords


def build_emoji(folder: Path, font: str | None = None) -> int:
    """Draws every emoji into `folder`, with a `metadata.jsonl` that `data/files.py` reads; returns how many pictures there are.

    The captions of a picture are its name, its aliases, and its keywords in one line; its group is its base emoji, so that all pictures of one
    base are held out or trained on together. ValueError without a font, or where the folder has something in it.
    """
    try:
        from emoji import EMOJI_DATA
    except ImportError:
        raise ValueError("names of emoji come from the package emoji: pip install -e '.[data]'") from None
    face = find_font(font)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another folder, or delete it")
    keywords = read_keywords()
    rows: dict[bytes, dict] = {}  # by pixels: some flags look alike, and then are one picture with more captions
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for character, names in EMOJI_DATA.items():
        picture = draw_emoji(character, face) if names["status"] == FULLY_QUALIFIED else None
        if picture is None:
            continue
        captions = [name.strip(":").replace("_", " ") for name in (names["en"], *names.get("alias", ()))]
        known = {caption.casefold() for caption in captions}
        words = [word for word in keywords.get(character.replace("\ufe0f", ""), ()) if word.casefold() not in known]
        captions += [", ".join(words)] if words else []
        file_name = "-".join(f"{ord(c):x}" for c in character) + ".png"
        row = rows.setdefault(picture.tobytes(), {"file_name": file_name, "text": [], "group": base_emoji(character)})
        row["text"] += [caption for caption in captions if caption not in row["text"]]
        if row["file_name"] == file_name:
            picture.save(unfinished / file_name)
    if not rows:
        raise ValueError(f"{face.getname()[0]} has no colour emoji: give --font a colour emoji font")
    (unfinished / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()), encoding="utf-8")
    if folder.exists():
        folder.rmdir()
    unfinished.rename(folder)
    note = "" if keywords else "; no keywords, which are in Unicode's CLDR (Debian and Ubuntu: unicode-cldr-core)"
    print(f"{folder}: {len(rows):,} emoji of {len({row['group'] for row in rows.values()}):,} bases from {face.getname()[0]}{note}", flush=True)
    return len(rows)
