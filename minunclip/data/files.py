"""Your own pictures in place of the captioned world: a folder of pictures and captions, read with care, once, into arrays on disk.

Captions stand in `metadata.jsonl` or `metadata.csv` (columns file_name and text, and group where some pictures belong together), in `captions.json`
(COCO's format), or beside each picture in a text file of the same name, one caption a line. A file that cannot be used is skipped, counted by its
reason, and listed in `skipped.jsonl`.
"""

import csv
import hashlib
import io
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from minunclip.config import Preset
from minunclip.data.tokenizer import Tokenizer
from minunclip.data.world import World, load_world, picture_sizes, require_only

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # read by content, whatever the file's name; none of them runs a program
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")  # what counts as a picture where no list names them
MOST_PIXELS = 64_000_000  # a larger picture may be a decompression bomb
MOST_CAPTIONS = 8  # a picture
MOST_SKIPPED = 0.5  # of all files: with more, the folder is not what its owner thinks
FEWEST = 20  # pictures to learn from
HELD_OUT, MOST_HELD = 10, 256  # one picture in so many is kept for validation, so many at most


Row = tuple[str, list[str], str]  # file name, captions, group


class Unusable(Exception):
    """A file that cannot be learned from; the message is the reason, the same for all of its kind."""


class Picture(NamedTuple):
    path: Path
    captions: tuple[str, ...]
    group: str  # pictures of one group are held out together, or learned from together; by default each is its own


@dataclass
class Listing:
    """What a folder holds: pictures with their captions, and what was skipped, with the reason."""

    pictures: list[Picture] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def reasons(self) -> str:
        """Counts by reason, the most frequent first."""
        return ", ".join(f"{count} {reason}" for reason, count in Counter(reason for _, reason in self.skipped).most_common())


def list_folder(folder: Path) -> Listing:
    """Every picture of a folder with its captions. No picture is opened yet; ValueError where there is no folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give --data a folder of pictures with captions")
    listing, named = Listing(), set()
    for name, captions, group in _entries(folder):
        try:
            path = _inside(folder, name)
            if path in named:
                raise Unusable("named twice")
            named.add(path)
            texts = tuple(dict.fromkeys(" ".join(text.split()) for text in _decoded(captions) if text.strip()))
            if not texts:
                raise Unusable("without a caption")
            listing.pictures.append(Picture(path, texts[:MOST_CAPTIONS], group))
        except Unusable as reason:
            listing.skipped.append((name, str(reason)))
    listing.pictures.sort()
    return listing


def _inside(folder: Path, name: str) -> Path:
    """The file of that name, if it is in the folder once all links are followed."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise Unusable("outside the folder")
    if not path.is_file():
        raise Unusable("not there")
    return path


def _decoded(captions: bytes | list[str]) -> list[str]:
    if isinstance(captions, list):
        return captions
    try:
        return captions.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise Unusable("with a caption that is not UTF-8") from None


def _entries(folder: Path) -> Iterator[tuple[str, bytes | list[str], str]]:
    """File names, captions and groups as the folder's list gives them, or else the text file beside each picture."""
    lists = [name for name in ("metadata.jsonl", "metadata.csv", "captions.json") if (folder / name).is_file()]
    if len(lists) > 1:
        raise ValueError(f"{folder} has {' and '.join(lists)}: keep one of them")
    if not lists:
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                text = path.with_suffix(".txt")
                name = path.relative_to(folder).as_posix()
                yield name, text.read_bytes() if text.is_file() else b"", name
        return
    source = folder / lists[0]
    try:
        content = source.read_text(encoding="utf-8-sig")
        rows = {".jsonl": _json_lines, ".csv": _csv_rows, ".json": _coco}[source.suffix](content)
        yield from [(str(name), [str(text) for text in texts], str(group)) for name, texts, group in rows]
    except UnicodeDecodeError:
        raise ValueError(f"{source} is not UTF-8 text: save it with that encoding") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{source} is not as expected ({type(error).__name__}: {error}): see the head of minunclip/data/files.py") from None


def _json_lines(content: str) -> list[Row]:
    rows = [json.loads(line) for line in content.splitlines() if line.strip()]
    return [(row["file_name"], row["text"] if isinstance(row["text"], list) else [row["text"]], row.get("group", row["file_name"])) for row in rows]


def _csv_rows(content: str) -> list[Row]:
    texts: dict[tuple[str, str], list[str]] = {}
    for row in csv.DictReader(io.StringIO(content)):  # a picture may have several rows
        texts.setdefault((row["file_name"], row.get("group") or row["file_name"]), []).append(row["text"] or "")
    return [(name, captions, group) for (name, group), captions in texts.items()]


def _coco(content: str) -> list[Row]:
    found = json.loads(content)
    texts: dict[int, list[str]] = {image["id"]: [] for image in found["images"]}
    for note in found["annotations"]:
        texts[note["image_id"]].append(note["caption"])
    return [(image["file_name"], texts[image["id"]], image["file_name"]) for image in found["images"]]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without the white space around them, empty ones left out. ValueError where it is no UTF-8."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save it with that encoding") from None
    return [line.strip() for line in lines if line.strip()]


def read_square(path: Path) -> Image.Image:
    """The middle square of a picture in RGB, upright, transparency on white, of an animation the first frame. Unusable where it cannot be read."""
    try:
        with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as image:
            warnings.simplefilter("ignore")
            if image.width * image.height > MOST_PIXELS:
                raise Unusable(f"of more than {MOST_PIXELS / 1e6:.0f} million pixels")
            image.load()
            upright: Image.Image = ImageOps.exif_transpose(image)
    except Image.DecompressionBombError:
        raise Unusable(f"of more than {MOST_PIXELS / 1e6:.0f} million pixels") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise Unusable("empty" if path.stat().st_size == 0 else "no picture" if isinstance(error, Image.UnidentifiedImageError) else "broken") from None
    if upright.mode.startswith("I"):  # 16 bits a pixel
        upright = Image.fromarray((np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if upright.mode in ("RGBA", "LA", "PA", "La") or "transparency" in upright.info:
        seen = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    side = min(upright.size)
    left, top = (upright.width - side) // 2, (upright.height - side) // 2
    return upright.convert("RGB").crop((left, top, left + side, top + side))


def _readable(listing: Listing, folder: Path, progress: Any = iter) -> Iterator[tuple[Picture, Image.Image]]:
    """Every picture that can be read; the others are added to what is skipped."""
    for picture in progress(listing.pictures):
        try:
            square = read_square(picture.path)
        except Unusable as reason:
            listing.skipped.append((picture.path.relative_to(folder).as_posix(), str(reason)))
        else:
            yield picture, square


def check_folder(folder: Path, progress: Any = iter) -> Listing:
    """`list_folder`, with every picture opened once: what a training would use, and what it would skip."""
    listing = list_folder(folder)
    good = [picture for picture, _ in _readable(listing, folder, progress)]
    return Listing(good, listing.skipped)


def _sized(square: Image.Image, side: int) -> np.ndarray:
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))


def _save_rows(path: Path, array: np.ndarray, rows: np.ndarray) -> None:
    """Some rows of an array as a .npy file, a few at a time: the whole may not fit into memory."""
    kept = np.lib.format.open_memmap(path, "w+", array.dtype, (len(rows), *array.shape[1:]))
    for start in range(0, len(rows), 1024):
        kept[start : start + 1024] = array[rows[start : start + 1024]]


def build_collection(preset: Preset, source: Path, folder: Path, seed: int = 0, tokenizer: Tokenizer | None = None) -> World:
    """Reads a folder of pictures into arrays under `folder`, or maps what an earlier call has read.

    Without a `tokenizer` (that of the weights to start from) one is trained on the captions. ValueError where too few files are usable.
    """
    listing = list_folder(source)
    sizes = picture_sizes(preset)
    stamps = [(picture, picture.path.stat().st_size, picture.path.stat().st_mtime_ns) for picture in listing.pictures]
    words = (preset.clip.vocabulary_size, preset.clip.context_length, tokenizer.merges if tokenizer else None)
    home = folder / f"world-{hashlib.sha256(repr((stamps, sizes, words, seed)).encode()).hexdigest()[:12]}"
    require_only(home)
    if (home / "done").exists():
        return load_world(home)

    count = len(listing.pictures)
    names = {"pictures": sizes[0], "small": sizes[1], "middle": sizes[2], "parts": sizes[4] // 4, "parts_small": sizes[3] // 4}
    home.mkdir(parents=True, exist_ok=True)
    raw = {name: np.lib.format.open_memmap(home / f".{name}.tmp", "w+", np.uint8, (max(1, count), side, side, 3)) for name, side in names.items()}
    texts: list[tuple[str, ...]] = []
    ranks: list[str] = []
    rng = np.random.default_rng([seed, 8])
    grid = 3 * sizes[3] // 4 + 1  # a quarter starts on a whole pixel of the smaller picture
    for picture, square in _readable(listing, source):
        row = len(texts)
        for name in ("pictures", "small", "middle"):
            raw[name][row] = _sized(square, names[name])
        x, y = (int(start) for start in rng.integers(grid, size=2))
        for name, whole in (("parts", sizes[4]), ("parts_small", sizes[3])):
            left, top = x * whole // sizes[3], y * whole // sizes[3]
            raw[name][row] = _sized(square, whole)[top : top + whole // 4, left : left + whole // 4]
        texts.append(picture.captions)
        ranks.append(hashlib.sha256(picture.group.encode()).hexdigest())
    total = len(texts) + len(listing.skipped)
    if len(texts) < FEWEST or len(listing.skipped) > MOST_SKIPPED * total:
        shutil.rmtree(home)
        skipped = listing.reasons() or "none"
        raise ValueError(f"{source}: {len(texts)} of {total} pictures can be used, at least {FEWEST} and half are needed; skipped: {skipped}")

    order = np.argsort(ranks, kind="stable")  # by group, but well mixed: who is held out does not change when pictures are added
    last = ranks[order[min(MOST_HELD, max(1, len(texts) // HELD_OUT)) - 1]]
    held = sum(rank <= last for rank in ranks)  # whole groups
    if held == len(texts):
        shutil.rmtree(home)
        raise ValueError(f"{source}: all pictures are of one group, so that none can be held out: name several in its list, or none")
    tokenizer = tokenizer or Tokenizer.train((text for row in texts for text in row), preset.clip.vocabulary_size)
    tokenizer.save(home / "tokenizer.json")
    most = max(len(captions) for captions in texts)
    every = tokenizer([captions[k % len(captions)] for captions in texts for k in range(most)], preset.clip.context_length)[0].numpy().astype(np.uint16)
    for split, rows in (("held-", order[:held]), ("", order[held:])):
        for name in names:
            if not split or name in ("pictures", "small"):
                _save_rows(home / f"{split}{name}.npy", raw[name], rows)
        np.save(home / f"{split}captions.npy", every.reshape(len(texts), most, -1)[rows])
    for name in names:
        (home / f".{name}.tmp").unlink()
    (home / "skipped.jsonl").write_text("".join(json.dumps({"file": name, "reason": reason}) + "\n" for name, reason in listing.skipped))
    (home / "done").touch()
    print(f"{source}: {len(texts) - held} pictures to learn from, {held} held out, {len(listing.skipped)} skipped ({listing.reasons() or 'none'})", flush=True)
    return load_world(home)
