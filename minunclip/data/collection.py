"""A folder of your own pictures as arrays on disk, the same that `data/world.py` draws: read once, memory-mapped, so that a training never waits for data.

Files and shards are read one after the other, in bounded memory. What is split over processes is not the reading but each batch: which pictures a
step sees is a function of the seed and the step (`Run.draw`), so none is lost or seen twice in an epoch, on any number of processes, and after a stop.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from minunclip.config import Preset
from minunclip.data.files import Crop, Listing, list_folder, read_pictures
from minunclip.data.tokenizer import Tokenizer
from minunclip.data.world import World, load_world, picture_sizes, require_only

MOST_SKIPPED = 0.5  # of all files: with more, the folder is not what its owner thinks
FEWEST = 20  # pictures to learn from
HELD_OUT, MOST_HELD = 10, 256  # one picture in so many is kept for validation, so many at most


def refusal(listing: Listing, used: int) -> str | None:
    """Why a training on a folder would stop, `used` of whose pictures can be read; None where it would not."""
    total = used + len(listing.skipped)
    if used >= FEWEST and len(listing.skipped) <= MOST_SKIPPED * total:
        return None
    return f"{used} of {total} pictures can be used, at least {FEWEST} and {MOST_SKIPPED:.0%} are needed; skipped: {listing.reasons()}"


def build_collection(preset: Preset, source: Path, folder: Path, seed: int = 0, tokenizer: Tokenizer | None = None, crop: Crop = "centre") -> World:
    """Reads a folder of pictures into arrays under `folder`, or maps what an earlier call has read.

    Without a `tokenizer` (that of the weights to start from) one is trained on the captions. ValueError where too few files are usable.
    """
    listing = list_folder(source)
    sizes = picture_sizes(preset)
    stamps = [(picture, picture.file.stat().st_mtime_ns) for picture in listing.pictures]
    words = (preset.clip.vocabulary_size, preset.clip.context_length, tokenizer.merges if tokenizer else None)
    home = folder / f"world-{hashlib.sha256(repr((stamps, sizes, words, seed, crop)).encode()).hexdigest()[:12]}"
    require_only(home)
    if (home / "done").exists():
        return load_world(home)

    names = {"pictures": sizes[0], "small": sizes[1], "middle": sizes[2], "parts": sizes[4] // 4, "parts_small": sizes[3] // 4}

    def resized(square: Image.Image, rng: np.random.Generator) -> dict[str, np.ndarray]:
        pictures = {name: _sized(square, names[name]) for name in ("pictures", "small", "middle")}
        x, y = (int(start) for start in rng.integers(3 * sizes[3] // 4 + 1, size=2))  # a quarter starts on a whole pixel of the smaller picture
        for name, whole in (("parts", sizes[4]), ("parts_small", sizes[3])):
            left, top = x * whole // sizes[3], y * whole // sizes[3]
            pictures[name] = _sized(square, whole)[top : top + whole // 4, left : left + whole // 4]
        return pictures

    home.mkdir(parents=True, exist_ok=True)
    count = max(1, len(listing.pictures))
    raw = {name: np.lib.format.open_memmap(home / f".{name}.tmp", "w+", np.uint8, (count, side, side, 3)) for name, side in names.items()}
    texts: list[tuple[str, ...]] = []
    ranks: list[str] = []
    for picture, arrays in read_pictures(listing, resized, crop, seed):
        for name, array in arrays.items():
            raw[name][len(texts)] = array
        texts.append(picture.captions)
        ranks.append(hashlib.sha256(picture.group.encode()).hexdigest())
    if reason := refusal(listing, len(texts)):
        shutil.rmtree(home)
        raise ValueError(f"{source}: {reason}; `minunclip data check` names them")

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
    print(f"{source}: {len(texts) - held} pictures to learn from, {held} held out, {len(listing.skipped)} skipped ({listing.reasons()})", flush=True)
    return load_world(home)


def _sized(square: Image.Image, side: int) -> np.ndarray:
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))


def _save_rows(path: Path, array: np.ndarray, rows: np.ndarray) -> None:
    """Some rows of an array as a .npy file, a few at a time: the whole may not fit into memory."""
    kept = np.lib.format.open_memmap(path, "w+", array.dtype, (len(rows), *array.shape[1:]))
    for start in range(0, len(rows), 1024):
        kept[start : start + 1024] = array[rows[start : start + 1024]]
