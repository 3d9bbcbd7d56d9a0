"""How fast batches of your own pictures come from arrays and from a stream, beside what it takes to do no more than decode the same files.

    python benchmarks/streaming.py PICTURES [--preset cpu] [--batch 64] [--json FILE]

Run it on an idle machine. The files have been read just before, so that it measures decoding and resizing, not the disk. `decoded` is Pillow alone, with as
many threads: no stream could be faster. Memory of the index is that of one picture, on disk and, while a folder is first read, in the process.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from minunclip.config import PRESETS
from minunclip.data.collection import build_collection
from minunclip.data.files import AT_ONCE, list_folder, read_square
from minunclip.runs import Run

BATCHES = 12


def per_second(batch: Callable[[int], object], size: int) -> float:
    """Pictures a second, from the median time of a batch."""
    seconds = []
    for step in range(BATCHES + 2):
        start = time.perf_counter()
        batch(step)
        seconds.append(time.perf_counter() - start)
    return size / statistics.median(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    facts: dict[str, object] = {"load_before": round(os.getloadavg()[0], 1)} if hasattr(os, "getloadavg") else {}
    facts |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "folder": given.pictures.name, "preset": given.preset, "batch": given.batch}

    tracemalloc.start()
    listing = list_folder(given.pictures)
    facts["pictures"] = len(listing.pictures)
    facts["listing_bytes"] = round(tracemalloc.get_traced_memory()[0] / len(listing.pictures))
    tracemalloc.stop()

    def decoded(step: int) -> list[object]:
        some = [listing.pictures[i % len(listing.pictures)] for i in range(step * given.batch, (step + 1) * given.batch)]
        with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
            return list(pool.map(lambda picture: read_square(picture.content()).size, some))

    found = {"decoded": per_second(decoded, given.batch)}

    def draw(run: Run, view: str, step: int) -> torch.Tensor:
        return run.read(getattr(run.world, view), run.draw(step, given.batch, "decoder")[0])

    with tempfile.TemporaryDirectory() as folder:
        for name in ("arrays", "stream"):
            start = time.perf_counter()
            world = build_collection(PRESETS[given.preset], given.pictures, Path(folder, name, "data"), stream=name == "stream")
            found[f"{name}, first reading"] = len(listing.pictures) / (time.perf_counter() - start)
            facts[f"{name}_bytes"] = round(sum(file.stat().st_size for file in world.folder.iterdir() if not file.name.startswith("held-")) / len(world))
            run = Run(PRESETS[given.preset], Path(folder, name), torch.device("cpu"), data=given.pictures)
            for view in ("pictures", "small", "middle", "parts"):
                found[f"{name}, {view}"] = per_second(partial(draw, run, view), given.batch)
    figures = {name: round(value, 1) for name, value in found.items()}
    print(json.dumps(facts | {"pictures_per_second": figures}, indent=1))
    if given.json:
        given.json.write_text(json.dumps(facts | {"pictures_per_second": figures}, indent=1))


if __name__ == "__main__":
    main()
