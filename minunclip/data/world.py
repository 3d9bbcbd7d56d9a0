"""The captioned world as arrays on disk: drawn once, memory-mapped, so that no training step waits for drawing.

A batch is a pure function of the seed and the step (no shuffled iterator whose place would have to be saved): a resumed run sees
exactly the batches that an uninterrupted one would have seen.
"""

import hashlib
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from minunclip.config import Preset
from minunclip.data.captions import LEVELS, caption
from minunclip.data.render import render
from minunclip.data.scenes import NESTED, kind_of, sample_scenes, twin
from minunclip.data.streams import VIEWS, Streamed, load_streams
from minunclip.data.tokenizer import Tokenizer

Pictures = np.ndarray | Streamed
READ_FOR_WORDS = 60_000  # scenes whose captions a tokenizer is trained on: more tell no more, and so `cpu` and `long` have the same one
HELD_OUT_SEED = 1_000_003  # evaluation scenes are the same whatever seed a training used


@dataclass(frozen=True)
class World:
    """Pictures are uint8 (N, side, side, 3), arrays or read when asked for; captions are token ids (N, levels, L), padded with 0."""

    folder: Path
    pictures: Pictures  # at the size that CLIP sees
    small: Pictures  # at the size that the decoder draws
    captions: np.ndarray
    middle: Pictures  # the first rows of `small`, or all, at the size that the first upsampler draws
    parts: Pictures  # random crops of the same at the size that the second upsampler draws
    parts_small: Pictures  # the same crops at the size that it is shown
    tokenizer: Tokenizer
    held: dict[str, np.ndarray] | None = None  # pictures, small and captions kept for validation; the captioned world draws its own
    nested: np.ndarray | None = None  # rows in which a thing lies inside another; of other pictures nobody knows

    def __len__(self) -> int:
        return len(self.pictures)


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1], channels last in memory."""
    return rearrange(torch.from_numpy(np.ascontiguousarray(pictures)), "b h w c -> b c h w").float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] to uint8 (B, H, W, 3)."""
    return rearrange(((images.float().clamp(-1, 1) + 1) * 127.5).round().byte(), "b c h w -> b h w c").cpu().numpy()


def trim(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Padded captions (B, L) to the length of the longest, and their mask: padding costs time and changes nothing.

    On a GPU they stay as they are: to ask it for the longest is to wait for it, and another length for every batch is another graph to compile.
    """
    mask = (tokens != 0).flip(1).cummax(dim=1).values.flip(1)  # up to the last that is not 0: in CLIP's vocabulary 0 is a token too, "!" within a word
    if tokens.is_cuda:
        return tokens, mask
    longest = max(1, int(mask.sum(dim=1).max()))
    return tokens[:, :longest], mask[:, :longest]


def training_captions(scenes: list, seed: int) -> list[list[str]]:
    """For every scene one caption of each level, from terse to full."""
    rng = np.random.default_rng([seed, 7])
    return [[caption(scene, level, rng) for level in LEVELS] for scene in scenes]


def picture_sizes(preset: Preset) -> tuple[int, int, int, int, int, int]:
    """Sides of a World's five kinds of pictures, in the order of VIEWS, and of the whole picture that the small parts are cut from."""
    second = preset.upsampler2
    parts = second.high_size // second.crop, second.low_size // second.crop
    return preset.clip.image_size, preset.decoder.image_size, preset.upsampler1.high_size, *parts, second.low_size


def build_world(preset: Preset, folder: Path, seed: int = 0, tokenizer: Tokenizer | None = None) -> World:
    """Draws the training scenes of a preset under `folder`, or maps what an earlier call has drawn there.

    Without a `tokenizer` (that of the weights to start from) one is trained on the captions.
    """
    config = preset.world
    sizes = picture_sizes(preset)
    words: tuple[Any, ...] = (preset.clip.vocabulary_size, preset.clip.context_length)
    if tokenizer is not None:
        words += (tokenizer.merges,)
    key = hashlib.sha256(repr((asdict(config), sizes, words, seed)).encode() + _drawing_code()).hexdigest()[:12]
    home = folder / f"world-{key}"
    require_only(home)
    if not (home / "done").exists():
        home.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        scenes = sample_scenes(config.training_scenes // 2, seed)
        rng = np.random.default_rng([seed, 9])
        scenes = [one for scene in scenes for one in (scene, twin(scene, rng))]  # scene i and its twin i + 1, i even
        texts = training_captions(scenes, seed)
        tokenizer = tokenizer or Tokenizer.train((text for row in texts[:READ_FOR_WORDS] for text in row), preset.clip.vocabulary_size)
        tokenizer.save(home / "tokenizer.json")
        tokens = tokenizer([text for row in texts for text in row], preset.clip.context_length)[0]
        arrays = {
            "pictures": render(scenes, preset.clip.image_size),
            "small": render(scenes, preset.decoder.image_size),
            "captions": rearrange(tokens, "(n k) l -> n k l", k=len(LEVELS)).numpy().astype(np.uint16),
            "nested": np.flatnonzero([kind_of(scene) == NESTED for scene in scenes]),
        }
        large = scenes[: config.upsampler_scenes]
        arrays["middle"] = render(large, preset.upsampler1.high_size)
        rng = np.random.default_rng([seed, 8])
        part, part_small, whole = sizes[3:]
        starts = rng.integers(whole - part_small + 1, size=(len(large), 2))  # on whole pixels of the smaller picture
        windows = np.concatenate([starts, np.full((len(large), 1), part_small)], axis=1) / whole
        arrays["parts"], arrays["parts_small"] = (render(large, side, windows) for side in (part, part_small))
        for name, array in arrays.items():
            save_array(home / f"{name}.npy", array)
        (home / "done").touch()
        seconds = time.perf_counter() - start
        print(f"world: {len(scenes):,} scenes drawn in {seconds:.0f} s ({len(scenes) / seconds:,.0f} a second), {_size(home) / 1e6:,.0f} MB", flush=True)
    return load_world(home)


def require_only(home: Path) -> None:
    """ValueError where another world stands beside `home`: models trained on one know nothing of the tokens and pictures of another."""
    others = [path.name for path in home.parent.glob("world-*") if path != home]
    if others:
        raise ValueError(f"{home.parent} holds {others[0]}, of other data, settings or code: give another --out, or delete the whole run")


def load_world(home: Path) -> World:
    """Maps the arrays, or the index, of a folder that `build_world` or `collection.build_collection` has filled."""
    pictures: dict[str, Any] = {}
    if (home / "stream.json").exists():
        pictures |= load_streams(home)
    else:
        pictures |= {name: np.load(home / f"{name}.npy", mmap_mode="r") for name in VIEWS}
    captions = np.load(home / "captions.npy", mmap_mode="r")
    held = {path.stem.removeprefix("held-"): np.load(path, mmap_mode="r") for path in home.glob("held-*.npy")}
    rows = home / "nested.npy"
    nested = np.load(rows) if rows.exists() else None
    return World(folder=home, captions=captions, **pictures, tokenizer=Tokenizer.load(home / "tokenizer.json"), held=held or None, nested=nested)


def save_array(path: Path, array: np.ndarray) -> None:
    """A .npy file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
    os.replace(temporary, path)


def array_on_disk(path: Path, kind: type, shape: tuple[int, ...]) -> np.ndarray:
    """A new .npy file as an array. OSError where the disk has no room for it: found out later, in writing, that would kill the process without a word."""
    array = np.lib.format.open_memmap(path, "w+", kind, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _drawing_code() -> bytes:
    """The source of all that decides what a world looks like: when it changes, so does the world."""
    return b"".join((Path(__file__).parent / f"{name}.py").read_bytes() for name in ("scenes", "render", "captions", "tokenizer", "world"))


def _size(folder: Path) -> int:
    return sum(os.path.getsize(path) for path in folder.iterdir())
