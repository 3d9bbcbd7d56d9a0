"""One training of the chain: its folder, its data, CLIP's frozen embeddings, and what every stage of it draws at random."""

import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from filelock import FileLock
from torch import Tensor, nn

from minunclip.config import BASELINES, PRESETS, STAGES, CLIPConfig, Preset
from minunclip.data.collection import build_collection
from minunclip.data.files import Crop
from minunclip.data.render import render
from minunclip.data.scenes import sample_scenes, twin
from minunclip.data.streams import Streamed
from minunclip.data.tokenizer import Tokenizer
from minunclip.data.world import Pictures, World, array_on_disk, build_world, to_tensor, to_uint8, training_captions
from minunclip.diffusion import Schedule
from minunclip.distributed import rank, ranks
from minunclip.loading import config_to_json, file_hash, load_model, read_json
from minunclip.models.clip import CLIP
from minunclip.training import Batch, TrainingError, save_model

GRID = 16  # pictures in a sample grid
NESTED_SHARE = 3  # one in so many pictures that the decoder trains on shows a thing inside another; of the world's, one in fourteen does


def tile(pictures: np.ndarray, columns: int = 8) -> np.ndarray:
    """uint8 (N, H, W, 3) to one picture (rows * H, columns * W, 3); the last row is filled up with white."""
    missing = -len(pictures) % columns
    pictures = np.concatenate([pictures, np.full((missing, *pictures.shape[1:]), 255, np.uint8)])
    return rearrange(pictures, "(rows columns) h w c -> (rows h) (columns w) c", columns=columns)


def in_pairs_of_rows(above: Tensor, below: Tensor) -> np.ndarray:
    """Pictures (N, 3, S, S) in [-1, 1] in rows of eight, below each row that of the other set; one picture, uint8."""
    return np.concatenate([tile(to_uint8(row)) for pair in zip(above.split(8), below.split(8)) for row in pair])


@dataclass
class Run:
    """One training of the chain: a preset, a folder with one sub-folder a stage, a device, a seed."""

    preset: Preset
    folder: Path
    device: torch.device
    seed: int = 0
    data: Path | None = None  # a folder of your own pictures; without it, the captioned world
    init: Path | None = None  # a folder of weights to start from
    crop: Crop = "centre"  # which square of a picture of your own
    published: Path | None = None  # a folder with a published CLIP and its vocabulary, which takes the place of our own
    stream: bool = False  # whether pictures of your own are read when a batch asks for them, and not kept as arrays
    tokenizer: Tokenizer | None = None  # without one, and without weights to start from, one is trained

    @cached_property
    def world(self) -> World:
        tokenizer = self.tokenizer if self.init is None else Tokenizer.load(self.init / "tokenizer.json")
        tokenizer = tokenizer if self.published is None else Tokenizer.from_clip(self.published)
        with self.alone():
            _forget_unfinished(self.folder / "data")
            if self.data is None:
                return build_world(self.preset, self.folder / "data", self.seed, tokenizer)
            return build_collection(self.preset, self.data, self.folder / "data", self.seed, tokenizer, self.crop, self.stream)

    @cached_property
    def clip(self) -> CLIP:
        if not (self.folder / "clip" / "model.safetensors").exists():
            raise TrainingError(f"{self.folder / 'clip'} has no trained CLIP, which this stage needs: run `minunclip train clip` first")
        clip = load_model("clip", self.folder / "clip")
        assert isinstance(clip, CLIP)
        return clip.to(self.device).eval().requires_grad_(False)

    @cached_property
    def clip_is_new(self) -> bool:
        """Whether CLIP is another than that of the weights to start from, so that what was fitted to its embeddings must be fitted anew."""
        assert self.init is not None
        return (self.folder / "clip" / "model.safetensors").read_bytes() != (self.init / "clip" / "model.safetensors").read_bytes()

    @cached_property
    def image_embeddings(self) -> np.ndarray:
        """z_i of every training picture, float32 (N, d), computed once and kept under the hash of CLIP's weights."""
        path = self.world.folder / f"image-embeddings-{file_hash(self.folder / 'clip' / 'model.safetensors')[:12]}.npy"
        with self.alone():
            if not path.exists():
                temporary = path.with_name(f".{path.name}.tmp")
                found = array_on_disk(temporary, np.float32, (len(self.world), self.preset.clip.embedding_dim))
                for chunk in np.array_split(np.arange(len(self.world)), max(1, len(self.world) // 500)):
                    found[chunk] = self._embed(self.world.pictures[chunk]).cpu().numpy()
                os.replace(temporary, path)
        return np.load(path, mmap_mode="r")

    def alone(self) -> FileLock:
        """A lock that holds up other stages of this run, trained beside this one, while one of them writes what all read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".lock")

    @torch.no_grad()
    def _embed(self, pictures: np.ndarray) -> Tensor:
        return self.clip.encode_image(to_tensor(pictures).to(self.device))

    @cached_property
    def validation(self) -> Batch:
        """Pairs that validation losses are computed on: never trained on. The world has twins too."""
        if self.world.held is not None:
            held = {name: to_tensor(self.world.held[name].copy()).to(self.device) for name in ("pictures", "small")}
            return {**held, "tokens": torch.from_numpy(self.world.held["captions"][:, 0].astype(np.int64)).to(self.device)}
        scenes = sample_scenes(self.preset.world.validation_scenes, seed=self.seed + 2, held_out=True)
        texts = [row[-1] for row in training_captions(scenes, self.seed + 2)]
        tokens = self.world.tokenizer(texts, self.preset.clip.context_length)[0]
        rng = np.random.default_rng([self.seed, 10])
        pictures = {
            "pictures": render(scenes, self.preset.clip.image_size),
            "twins": render([twin(scene, rng) for scene in scenes], self.preset.clip.image_size),
            "small": render(scenes, self.preset.decoder.image_size),
        }
        return {"tokens": tokens.to(self.device), **{name: to_tensor(array).to(self.device) for name, array in pictures.items()}}

    def draw(self, step: int, size: int, stage: str, count: int | None = None) -> tuple[np.ndarray, np.random.Generator]:
        """Which examples, of the first `count`, step `step` of a stage sees: a function of seed, stage and step alone, so that a run can be resumed.

        From the captioned world they are drawn at random. Your own pictures are shuffled in each epoch anew, and shown once in it.
        Returns their numbers (size,), ascending, and the generator of what else the step draws.
        """
        key, count = (self.seed, (STAGES + BASELINES).index(stage)), count or len(self.world)
        rng = np.random.default_rng([*key, step])
        if self.world.held is None:
            return np.sort(rng.integers(count, size=size)), rng
        epochs, places = np.divmod(np.arange(step * size, (step + 1) * size), count)
        return np.sort(np.concatenate([_shuffled(count, *key, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])), rng

    def draw_for_decoder(self, step: int, size: int, stage: str) -> tuple[np.ndarray, np.random.Generator]:
        """As `draw`, of the decoder and of what it is compared with: from the captioned world one in NESTED_SHARE shows a thing inside another."""
        index, rng = self.draw(step, size, stage)
        if self.world.nested is not None and len(self.world.nested):
            rows = rng.permutation(size)[: size // NESTED_SHARE]
            index[rows] = rng.choice(self.world.nested, len(rows))
            index.sort()
        return index, rng

    def read(self, pictures: Pictures, index: np.ndarray, rows: np.ndarray | None = None) -> Tensor:
        """The pictures of a batch's `index`, or of some `rows` of it, (B, 3, H, W) in [-1, 1].

        Those read from files are each read by one process, whose share of the batch they are in (`training.fit`); to the others they are black.
        """
        rows = np.arange(len(index)) if rows is None else rows
        if not isinstance(pictures, Streamed):
            return to_tensor(pictures[index[rows]])
        found = np.zeros((len(rows), *pictures.shape[1:]), np.uint8)
        mine = rows // (len(index) // ranks()) == rank()
        found[mine] = pictures[index[rows[mine]]]
        return to_tensor(found)

    def captions(self, index: np.ndarray, rng: np.random.Generator) -> Tensor:
        """One caption of a random level for each scene, (B, L) padded."""
        return torch.from_numpy(self.world.captions[index, rng.integers(self.world.captions.shape[1], size=len(index))].astype(np.int64))


def _forget_unfinished(home: Path) -> None:
    """Deletes worlds of which the drawing or reading was stopped, which nobody has learned from: they would be in the way of another. Under the lock."""
    for path in home.glob("world-*"):
        if re.fullmatch(r"world-[0-9a-f]{12}", path.name) and path.is_dir() and not path.is_symlink() and not (path / "done").exists():
            shutil.rmtree(path)


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, stage: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, stage, epoch, 11]).permutation(count)


def read_ahead(batch: Callable[[int], Batch]) -> Callable[[int], Batch]:
    """The same batches, each read by a thread while the step before it is computed."""
    reader, waiting = ThreadPoolExecutor(1), dict[int, Future[Batch]]()

    def next_batch(step: int) -> Batch:
        found = waiting.pop(step, None) or reader.submit(batch, step)
        waiting.clear()
        waiting[step + 1] = reader.submit(batch, step + 1)
        return found.result()

    return next_batch


def flip(shape: int, chance: float, device: torch.device) -> Tensor:
    """(shape,) bool, each True with that chance: what classifier-free guidance drops."""
    return torch.rand(shape, device=device) < chance


def everywhere(batch: Tensor) -> Tensor:
    """A drop for every example of a batch: the loss without the condition, from which guidance starts."""
    return torch.ones(len(batch), dtype=torch.bool, device=batch.device)


Loss = Callable[[nn.Module, Batch], Tensor]
Trained = tuple[nn.Module, Callable[[int], Batch], Loss, dict[str, Any]]


def moments(schedule: Schedule, images: Tensor) -> tuple[Tensor, Tensor]:
    """A random timestep and noise for each image."""
    return torch.randint(schedule.steps, (len(images),), device=images.device), torch.randn_like(images)


def preset_named(name: str) -> Preset:
    """The preset of that name; ValueError with the names there are."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def on_clip(preset: Preset, clip: CLIPConfig) -> Preset:
    """The preset with the sizes that follow from another CLIP: what is seen of captions and embeddings; widths and depths stay."""
    reads: dict[str, Any] = {"embedding_dim": clip.embedding_dim, "context_length": clip.context_length}
    words: dict[str, Any] = {"vocabulary_size": clip.vocabulary_size, "context_length": clip.context_length}
    text = clip.text if preset.decoder.text_start == "clip" else preset.decoder.text
    return replace(
        preset,
        clip=clip,
        prior=replace(preset.prior, text_width=clip.text.width, **reads),
        ar_prior=replace(preset.ar_prior, text_width=clip.text.width, components=clip.embedding_dim, **reads),  # as many as it needs, of all there are
        decoder=replace(preset.decoder, embedding_dim=clip.embedding_dim, text=text, **words),
        dalle=replace(preset.dalle, **words),
    )


def _same_weights(model: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value.cpu(), theirs[name].cpu()) for name, value in model.state_dict().items())


def published_clip(folder: Path) -> CLIP:
    """The CLIP of a folder as the Hub has it. ValueError where it lacks words, or has more than the CLIP knows."""
    if not any((folder / name).is_file() for name in ("merges.txt", "tokenizer.json")):
        raise ValueError(f"{folder} has no merges.txt, CLIP's words: give --clip a folder with a CLIP as the Hub has it")
    published, words = CLIP.from_openai(folder).float(), len(Tokenizer.from_clip(folder))
    if words > published.config.vocabulary_size:
        raise ValueError(f"{folder} has {words} tokens, and a CLIP that knows {published.config.vocabulary_size}: they are of two models")
    return published


def adopt_clip(run: Run, clip: CLIP) -> None:
    """Puts a published CLIP where the stages of a run look for the one that they learn from. ValueError where another one is."""
    path, config = run.folder / "clip" / "config.json", config_to_json(clip.config)
    if not path.exists():
        save_model(path.parent, clip, config)
    elif read_json(path) != config or not _same_weights(load_model("clip", path.parent), clip):
        raise ValueError(f"{path.parent} is another CLIP, maybe with stages that have learned from it: give another --out")
