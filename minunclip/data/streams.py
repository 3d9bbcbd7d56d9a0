"""Pictures that are read from their files when a batch asks for them: for a folder whose arrays the disk cannot hold.

What is kept of a picture is where it begins and how long it is, 32 bytes, so that an epoch is shuffled as a whole, not within a buffer, and a run goes on in
the middle of it as it does with arrays. Every row is, bit for bit, the one that `build_collection` would have put into its array.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from minunclip.data.files import AT_ONCE, Crop, Picture, Unusable, number_of, read_picture

VIEWS = ("pictures", "small", "middle", "parts", "parts_small")  # the arrays of a World, each made of all pictures


def view_sides(sizes: Sequence[int]) -> dict[str, int]:
    """The side of each view; sizes are those of `world.picture_sizes`."""
    return dict(zip(VIEWS, sizes))


def views(square: Image.Image, rng: np.random.Generator, sizes: Sequence[int], names: Sequence[str] = VIEWS) -> dict[str, np.ndarray]:
    """Views of a picture's square, uint8 (side, side, 3) each. The two of parts show the same crop of it."""
    sides, part, whole = view_sides(sizes), sizes[4], sizes[5]
    x, y = (int(start) for start in rng.integers(whole - part + 1, size=2))  # a crop starts on a whole pixel of the smaller picture
    width = square.width
    crop = (x * width / whole, y * width / whole, (x + part) * width / whole, (y + part) * width / whole)
    boxes = {name: crop if name.startswith("parts") else None for name in names}
    return {name: np.asarray(square.resize((sides[name],) * 2, Image.Resampling.LANCZOS, box)) for name, box in boxes.items()}


@dataclass(frozen=True)
class Streamed:
    """One view of many pictures, to be indexed by an array of rows or a slice, as an array uint8 (N, side, side, 3) would be."""

    view: str
    files: list[str]
    places: np.ndarray  # int64 (N, 4): number of the file, start, bytes, and the number of the picture itself (`files.number_of`)
    sizes: tuple[int, ...]
    crop: Crop
    seed: int
    dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def shape(self) -> tuple[int, ...]:
        side = view_sides(self.sizes)[self.view]
        return len(self), side, side, 3

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """The rows, (B, side, side, 3). ValueError where a file is not as it was when the folder was first read."""
        found = np.empty((len(places := self.places[rows]), *self.shape[1:]), np.uint8)
        with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
            for i, row in enumerate(pool.map(self._read, places)):
                found[i] = row
        return found

    def _read(self, place: np.ndarray) -> np.ndarray:
        file, start, size, number = (int(value) for value in place)
        picture = Picture("", (), "", Path(self.files[file]), start, size)
        try:
            return read_picture(picture, number, lambda square, rng: views(square, rng, self.sizes, (self.view,))[self.view], self.crop, self.seed)
        except Unusable as reason:
            raise ValueError(
                f"{picture.file} has changed since the folder was first read (a picture in it is now {reason}): put the old one back, with its date "
                "(cp -p), and the same command goes on from the last checkpoint; or begin anew with another --out"
            ) from None


def stream_all(pictures: Sequence[Picture], sizes: Sequence[int], crop: Crop, seed: int) -> dict[str, Streamed]:
    """Every view of the pictures."""
    names = dict.fromkeys(str(picture.file.absolute()) for picture in pictures)
    numbers = {name: i for i, name in enumerate(names)}
    rows = [(numbers[str(picture.file.absolute())], picture.start, picture.size, number_of(picture.name)) for picture in pictures]
    return {name: Streamed(name, list(names), np.array(rows, np.int64).reshape(-1, 4), tuple(sizes), crop, seed) for name in VIEWS}


def save_stream(folder: Path, stream: Streamed, rows: np.ndarray) -> None:
    """Some rows of a stream as an index in two files, from which `load_streams` gives all views back."""
    np.save(folder / "places.npy", stream.places[rows])
    facts = {"files": stream.files, "sizes": stream.sizes, "crop": stream.crop, "seed": stream.seed}
    (folder / "stream.json").write_text(json.dumps(facts))


def load_streams(folder: Path) -> dict[str, Streamed]:
    """The views whose index `save_stream` has written."""
    facts = json.loads((folder / "stream.json").read_text())
    places = np.load(folder / "places.npy", mmap_mode="r")
    return {name: Streamed(name, facts["files"], places, tuple(facts["sizes"]), facts["crop"], facts["seed"]) for name in VIEWS}
