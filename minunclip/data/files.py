"""Your own pictures in place of the captioned world: finds the pictures and captions of a folder, and reads them with care.

Captions stand in `metadata.jsonl` or `metadata.csv` (columns file_name and text, and group where some pictures belong together), in `captions.json`
(COCO's format), beside each picture in a text file of the same name, one caption a line, or in tar shards as img2dataset writes them. What cannot be
used is skipped, and counted by its reason. `data/collection.py` makes of it what a training learns from.
"""

import csv
import hashlib
import io
import json
import os
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # read by content, whatever the file's name; none of them runs a program
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")  # what counts as a picture where no list names them
LISTS = ("metadata.jsonl", "metadata.csv", "captions.json")
MOST_PIXELS = 64_000_000  # a larger picture may be a decompression bomb
MOST_BYTES = 256_000_000  # a larger file too
MOST_CAPTIONS = 8  # a picture
DAMAGE = (tarfile.TarError, ValueError, OverflowError, OSError)  # what tarfile raises on a header that means nothing
AT_ONCE = 8  # pictures in memory, each read by a thread of its own: Pillow decodes without the interpreter's lock

warnings.filterwarnings("ignore", module=r"PIL\.")  # of flaws in files, which end in a picture or in a reason to skip it
Crop = Literal["centre", "random"]
T = TypeVar("T")


class Unusable(Exception):
    """A file that cannot be learned from; the message is the reason, the same for all of its kind."""


class Picture(NamedTuple):
    """A picture in a file of its own, or the part of a shard that holds it."""

    name: str  # below the folder, or SHARD/MEMBER
    captions: tuple[str, ...]
    group: str  # pictures of one group are held out together, or learned from together; by default each is its own
    file: Path
    start: int
    size: int  # bytes

    def content(self) -> bytes:
        """The file's bytes; Unusable where there are too many, or none to be had."""
        if self.size > MOST_BYTES:
            raise Unusable(f"of more than {MOST_BYTES / 1e6:.0f} million bytes")
        try:
            with open(self.file, "rb") as file:
                file.seek(self.start)
                return file.read(self.size)
        except OSError:
            raise Unusable("not readable") from None


@dataclass
class Listing:
    """What a folder holds: pictures with their captions, and what was skipped, with the reason."""

    pictures: list[Picture] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def reasons(self) -> str:
        """Counts by reason, the most frequent first."""
        return ", ".join(f"{count} {reason}" for reason, count in Counter(reason for _, reason in self.skipped).most_common()) or "none"


class Entry(NamedTuple):
    """A picture as a folder names it, not yet looked for, or a reason why it is not to be."""

    name: str
    captions: bytes | list[str] | Unusable
    group: str = ""
    place: tuple[Path, int, int] | None = None  # shard, start, bytes


def list_folder(folder: Path) -> Listing:
    """Every picture of a folder with its captions. No picture is opened yet; ValueError where there is no folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give --data a folder of pictures with captions")
    listing, named = Listing(), set()
    for entry in _entries(folder):
        try:
            if isinstance(entry.captions, Unusable):
                raise entry.captions
            file, start, size = entry.place or _inside(folder, entry.name)
            if (file, start) in named:
                raise Unusable("named twice")
            named.add((file, start))
            texts = tuple(dict.fromkeys(" ".join(text.split()) for text in _decoded(entry.captions) if text.strip()))
            if not texts:
                raise Unusable("without a caption")
            listing.pictures.append(Picture(_printable(entry.name), texts[:MOST_CAPTIONS], _printable(entry.group), file, start, size))
        except Unusable as reason:
            listing.skipped.append((_printable(entry.name), str(reason)))
    listing.pictures.sort()
    return listing


def _printable(name: str) -> str:
    """A file name may be any bytes; each of them that is no UTF-8 becomes a question mark."""
    return re.sub("[\ud800-\udfff]", "\ufffd", name)


def _inside(folder: Path, name: str) -> tuple[Path, int, int]:
    """The file of that name, if it is in the folder once all links are followed."""
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise Unusable("outside the folder")
        if not path.is_file():
            raise Unusable("not there")
        return path, 0, path.stat().st_size
    except (OSError, RuntimeError, ValueError):  # links in a circle, or a name that no file can have
        raise Unusable("not there") from None


def _decoded(captions: bytes | list[str]) -> list[str]:
    try:
        if isinstance(captions, list):
            return [text.encode().decode() for text in captions]  # fails where a list was not UTF-8
        return captions.decode("utf-8-sig").splitlines()
    except UnicodeError:
        raise Unusable("with a caption that is not UTF-8") from None


def _entries(folder: Path) -> Iterator[Entry]:
    """What the folder's list names, or what is in its shards, or else every picture with the text file beside it."""
    shards = sorted(path.name for path in folder.glob("*.tar") if path.is_file())
    lists = [name for name in LISTS if (folder / name).is_file()]
    if len(lists + shards[:1]) > 1:
        raise ValueError(f"{folder} has {' and '.join(lists + shards[:1])}: keep one of them")
    if shards:
        for name in shards:
            yield from _shard(folder, name)
    elif lists:
        source = folder / lists[0]
        try:
            content = source.read_bytes().decode("utf-8-sig", errors="surrogateescape")  # one bad caption does not spoil the others
            yield from {".jsonl": _json_lines, ".csv": _csv_rows, ".json": _coco}[source.suffix](content)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError, csv.Error) as error:
            raise ValueError(f"{source} is not as expected ({type(error).__name__}: {error}): see the head of minunclip/data/files.py") from None
    else:
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                name = path.relative_to(folder).as_posix()
                yield Entry(name, _sidecar(folder, f"{name.removesuffix(path.suffix)}.txt"), name)


def _sidecar(folder: Path, name: str) -> bytes:
    """What the text file beside a picture says: nothing where it is not there, or leads out of the folder."""
    try:
        return _inside(folder, name)[0].read_bytes()
    except (Unusable, OSError):
        return b""


def _entry(name: Any, captions: list[Any], group: Any = None) -> Entry:
    captions = ["" if text is None else text for text in captions]  # none written, which is said of it later
    if not all(isinstance(text, str) for text in captions):
        return Entry(str(name), Unusable("with a caption that is no text"))
    return Entry(str(name), captions, str(name if group is None else group))


def _json_lines(content: str) -> list[Entry]:
    entries = []
    for number, line in enumerate(content.split("\n"), 1):  # splitlines would also cut at U+2028, which JSON allows in a string
        try:
            if line.strip():
                row = json.loads(line)
                entries.append(_entry(row["file_name"], row["text"] if isinstance(row["text"], list) else [row["text"]], row.get("group")))
        except KeyError as missing:
            raise ValueError(f"line {number} has no {missing}") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg}, at character {error.pos + 1}") from None
    return entries


def _csv_rows(content: str) -> list[Entry]:
    texts: dict[str, list[str]] = {}
    groups: dict[str, str] = {}
    rows = csv.DictReader(io.StringIO(content))
    if not {"file_name", "text"} <= set(rows.fieldnames or ()):
        raise ValueError(f"the first line is {','.join(rows.fieldnames or ())!r}: name the columns file_name and text, with a comma between them")
    for row in rows:  # a picture may have several
        if any(row.get(None) or ()):  # type: ignore[call-overload]
            raise ValueError(f"line {rows.line_num} has more fields than the first: put a text with a comma in quotes")
        texts.setdefault(row["file_name"], []).append(row["text"] or "")
        if row.get("group"):
            groups.setdefault(row["file_name"], row["group"])
    return [_entry(name, captions, groups.get(name)) for name, captions in texts.items()]


def _coco(content: str) -> list[Entry]:
    found = json.loads(content)
    texts: dict[int, list[str]] = {image["id"]: [] for image in found["images"]}
    for note in found["annotations"]:
        if note["image_id"] in texts:  # those of pictures that were taken out are left over
            texts[note["image_id"]].append(note["caption"])
    if found["annotations"] and not any(texts.values()):
        raise ValueError("no image_id of the annotations is the id of an image")
    return [_entry(image["file_name"], texts[image["id"]]) for image in found["images"]]


def _shard(folder: Path, shard: str) -> Iterator[Entry]:
    """The samples of a tar file: KEY.jpg with KEY.txt, or with KEY.json, which has a "caption". Nothing is ever unpacked.

    Of a shard that is damaged or cut short, all that comes before the damage is used.
    """
    samples: dict[tuple[str, str], tarfile.TarInfo] = {}  # by key and suffix
    try:
        path, _, length = _inside(folder, shard)
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            try:
                for member in tar:
                    if member.size < 0:
                        raise tarfile.ReadError("the next header would be an earlier one, for ever")
                    suffix = PurePosixPath(member.name).suffix
                    place = member.name.removesuffix(suffix), suffix.lower()
                    reason = "named twice" if place in samples else _unfit(member, length)
                    if reason is None:
                        samples[place] = member
                    elif not member.isdir():
                        yield Entry(f"{shard}/{member.name}", Unusable(reason))
                file.seek(tar.offset)  # tarfile stops without a word at a header that is damaged
                complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)  # the mark of the end
            except DAMAGE:
                complete = False
            if not complete:
                yield Entry(shard, Unusable("damaged or cut short"))
            for (key, suffix), member in samples.items():
                if suffix in SUFFIXES:
                    name = f"{shard}/{member.name}"
                    yield Entry(name, _shard_captions(tar, samples, key), name, (path, member.offset_data, member.size))
    except Unusable as reason:
        yield Entry(shard, reason)
    except DAMAGE:
        yield Entry(shard, Unusable("no tar archive" if length else "empty"))


def _unfit(member: tarfile.TarInfo, length: int) -> str | None:
    """Why a member of a shard of that length is not read; None where nothing speaks against it."""
    if PurePosixPath(member.name).is_absolute() or ".." in PurePosixPath(member.name).parts:
        return "outside the folder"
    if not member.isreg() or member.issparse():
        return "no plain file"
    return "damaged or cut short" if member.offset_data + member.size > length else None


def _shard_captions(tar: tarfile.TarFile, samples: dict[tuple[str, str], tarfile.TarInfo], key: str) -> bytes | list[str]:
    def read(member: tarfile.TarInfo) -> bytes:
        file = tar.extractfile(member)  # reads; "extract" would write
        return file.read(MOST_BYTES) if file else b""

    if (key, ".txt") in samples:
        return read(samples[key, ".txt"])
    try:
        return [str(json.loads(read(samples[key, ".json"]))["caption"] or "")]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without the white space around them, empty ones left out. ValueError where it is no UTF-8."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save it with that encoding") from None
    return [line.strip() for line in lines if line.strip()]


def read_square(content: bytes, rng: np.random.Generator | None = None) -> Image.Image:
    """The middle square of a picture, or with `rng` a random one, in RGB, upright, transparency on white, of an animation the first frame.

    The square is as large as it can be, and the picture is not squeezed. Unusable where the file cannot be read.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Unusable(f"of more than {MOST_PIXELS / 1e6:.0f} million pixels")
            image.load()
            upright: Image.Image = ImageOps.exif_transpose(image)
    except Image.DecompressionBombError:
        raise Unusable(f"of more than {MOST_PIXELS / 1e6:.0f} million pixels") from None
    except Unusable:
        raise
    except Exception as error:  # readers of damaged pictures raise what they like
        raise Unusable("empty" if not content else "no picture" if isinstance(error, Image.UnidentifiedImageError) else "broken") from None
    if upright.mode == "F":
        raise Unusable("of floating-point numbers")
    if upright.mode.startswith("I"):  # 16 bits a pixel
        upright = Image.fromarray((np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if upright.mode in ("RGBA", "LA", "PA", "La") or "transparency" in upright.info:
        seen = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    side = min(upright.size)
    left, top = (room // 2 if rng is None else int(rng.integers(room + 1)) for room in (upright.width - side, upright.height - side))
    return upright.convert("RGB").crop((left, top, left + side, top + side))


def number_of(name: str) -> int:
    """A number of 48 bits for the name of a picture."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16)


def read_picture(picture: Picture, number: int, work: Callable[[Image.Image, np.random.Generator], T], crop: Crop, seed: int) -> T:
    """What `work` makes of a picture's square; Unusable where it cannot be read.

    Random numbers, for crop and work, depend on the seed and the picture's number alone: threads and other pictures change nothing.
    """
    rng = np.random.default_rng([seed, 8, number])
    return work(read_square(picture.content(), rng if crop == "random" else None), rng)


def read_pictures(
    listing: Listing, work: Callable[[Image.Image, np.random.Generator], T], crop: Crop = "centre", seed: int = 0, progress: Any = iter
) -> Iterator[tuple[Picture, T]]:
    """What `work` makes of the square of every picture that can be read, in the order of the listing; the others are added to what is skipped."""

    def one(picture: Picture) -> T | Unusable:
        try:
            return read_picture(picture, number_of(picture.name), work, crop, seed)
        except Unusable as reason:
            return reason

    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        pictures, done = listing.pictures, iter(progress(listing.pictures))
        for start in range(0, len(pictures), AT_ONCE):  # all at once would fill the memory with what waits to be taken
            for result in pool.map(one, pictures[start : start + AT_ONCE]):
                picture = next(done)
                if isinstance(result, Unusable):
                    listing.skipped.append((picture.name, str(result)))
                else:
                    yield picture, result


def check_folder(folder: Path, progress: Any = iter) -> Listing:
    """`list_folder`, with every picture opened once: what a training would use, and what it would skip."""
    listing = list_folder(folder)
    good = [picture for picture, _ in read_pictures(listing, lambda square, rng: None, progress=progress)]
    return Listing(good, listing.skipped)
