"""A folder of your own pictures as arrays on disk, the same that `data/world.py` draws: read once, memory-mapped, so that no step waits for decoding.
Or, where the disk cannot hold them, as an index, by which every batch is read from the files (`data/streams.py`), with the same pictures in it.

Files and shards are gone through one after the other, in bounded memory. What is split over processes is each batch: which pictures a step sees is a
function of the seed and the step (`Run.draw`), so none is lost or seen twice in an epoch, on any number of processes, and after a stop.
"""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from minunclip.config import Preset
from minunclip.data.files import Crop, Listing, Picture, list_folder, read_pictures
from minunclip.data.streams import VIEWS, save_stream, stream_all, view_sides, views
from minunclip.data.tokenizer import Tokenizer
from minunclip.data.world import Pictures, World, array_on_disk, load_world, picture_sizes, require_only

MOST_SKIPPED = 0.5  # of all files: with more, the folder is not what its owner thinks
FEWEST = 20  # pictures to learn from
HELD_OUT, MOST_HELD = 10, 256  # one picture in so many is kept for validation, so many at most


def refusal(listing: Listing, used: int) -> str | None:
    """Why a training on a folder would stop, `used` of whose pictures can be read; None where it would not."""
    total = used + len(listing.skipped)
    if used >= FEWEST and len(listing.skipped) <= MOST_SKIPPED * total:
        return None
    return f"{used} of {total} pictures can be used, at least {FEWEST} and {MOST_SKIPPED:.0%} are needed; skipped: {listing.reasons()}"


def build_collection(
    preset: Preset, source: Path, folder: Path, seed: int = 0, tokenizer: Tokenizer | None = None, crop: Crop = "centre", stream: bool = False
) -> World:
    """Reads a folder of pictures into arrays under `folder`, or with `stream` into an index of them; or maps what an earlier call has read, as it is.

    Without a `tokenizer` (that of the weights to start from) one is trained on the captions. ValueError where too few files are usable, or the disk
    cannot hold the arrays.
    """
    listing = list_folder(source)
    sizes = picture_sizes(preset)
    home = folder / f"world-{_key(listing, sizes, preset, tokenizer, seed, crop)}"
    require_only(home)
    if (home / "done").exists():
        return load_world(home)

    home.mkdir(parents=True, exist_ok=True)
    raw: dict[str, Pictures] = {} if stream else _room_for(listing, sizes, home)
    used: list[Picture] = []
    for picture, arrays in read_pictures(listing, lambda square, rng: None if stream else views(square, rng, sizes), crop, seed):
        for name, array in (arrays or {}).items():
            raw[name][len(used)] = array  # type: ignore[index]
        used.append(picture)
    if reason := refusal(listing, len(used)):
        shutil.rmtree(home)
        raise ValueError(f"{source}: {reason}; `minunclip data check` names them")

    ranks = [hashlib.sha256(picture.group.encode()).hexdigest() for picture in used]
    sizes_of, out, held = Counter(ranks), set(), 0
    for rank in sorted(sizes_of):  # whole groups, well mixed: who is held out does not change when pictures are added
        if held < min(MOST_HELD, len(used) // HELD_OUT) and held + sizes_of[rank] <= len(used) // 2:
            out.add(rank)
            held += sizes_of[rank]
    if held < 2:
        shutil.rmtree(home)
        raise ValueError(f"{source}: all pictures are of one group, or nearly all, so that none can be held out: name several in its list, or none")
    order = np.array(sorted(range(len(used)), key=lambda i: (ranks[i] not in out, ranks[i])))
    tokenizer = tokenizer or Tokenizer.train((text for picture in used for text in picture.captions), preset.clip.vocabulary_size)
    tokenizer.save(home / "tokenizer.json")
    if stream:
        raw |= stream_all(used, sizes, crop, seed)
        save_stream(home, raw["pictures"], order[held:])  # type: ignore[arg-type]
    for name in ("pictures", "small"):
        _save_rows(home / f"held-{name}.npy", raw[name], order[:held])
    for name in () if stream else VIEWS:
        _save_rows(home / f"{name}.npy", raw[name], order[held:])
        (home / f".{name}.tmp").unlink()
    most, room = max(len(picture.captions) for picture in used), preset.clip.context_length
    every = array_on_disk(home / ".captions.tmp", np.uint16, (len(used), most, room))
    for i, picture in enumerate(used):
        every[i] = tokenizer([picture.captions[k % len(picture.captions)] for k in range(most)], room)[0].numpy()
    _save_rows(home / "held-captions.npy", every, order[:held])
    _save_rows(home / "captions.npy", every, order[held:])
    (home / ".captions.tmp").unlink()
    (home / "skipped.jsonl").write_text("".join(json.dumps({"file": name, "reason": reason}) + "\n" for name, reason in listing.skipped))
    (home / "done").touch()
    print(f"{source}: {len(used) - held} pictures to learn from, {held} held out, {len(listing.skipped)} skipped ({listing.reasons()})", flush=True)
    texts = [text for picture in used for text in picture.captions]
    if cut := sum(tokenizer.length(text) > room for text in texts):
        print(f"{source}: {cut} of {len(texts)} captions are longer than the {room} tokens that are read, and are cut", flush=True)
    return load_world(home)


def _key(listing: Listing, sizes: tuple[int, ...], preset: Preset, tokenizer: Tokenizer | None, seed: int, crop: Crop) -> str:
    """Twelve digits that change with the pictures, their captions, and whatever is made of them."""
    words = (preset.clip.vocabulary_size, preset.clip.context_length, tokenizer.merges if tokenizer else None)
    digest = hashlib.sha256(repr((sizes, words, seed, crop)).encode())
    stamps = {file: file.stat().st_mtime_ns for file in {picture.file for picture in listing.pictures}}
    for picture in listing.pictures:
        digest.update(repr((picture._replace(file=picture.file.resolve()), stamps[picture.file])).encode())
    return digest.hexdigest()[:12]


def _room_for(listing: Listing, sizes: tuple[int, ...], home: Path) -> dict[str, Pictures]:
    """Empty arrays on disk for every view of every picture. ValueError where there is no room for them and for their copies, in another order."""
    count, sides = max(1, len(listing.pictures)), view_sides(sizes)
    needed, free = 2 * count * sum(3 * side**2 for side in sides.values()), shutil.disk_usage(home).free
    if needed > free:
        shutil.rmtree(home)
        raise ValueError(f"arrays of {count:,} pictures take {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} are free: use --stream, which needs none")
    return {name: array_on_disk(home / f".{name}.tmp", np.uint8, (count, side, side, 3)) for name, side in sides.items()}


def _save_rows(path: Path, array: Pictures, rows: np.ndarray) -> None:
    """Some rows of an array as a .npy file, a few at a time: the whole may not fit into memory."""
    kept = array_on_disk(path, array.dtype.type, (len(rows), *array.shape[1:]))
    for start in range(0, len(rows), 1024):
        kept[start : start + 1024] = array[rows[start : start + 1024]]
