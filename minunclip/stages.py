"""The six trainings of unCLIP, in order, and that of its examiner: what each stage learns from, its loss, its validation, its samples.

CLIP first; then, on its frozen embeddings, the two priors and the decoder; the upsamplers and the checker need no CLIP. Every stage is a call of
`training.fit`, and leaves a folder with `config.json`, `model.safetensors` (the moving average), a log, a loss curve and sample pictures.
"""

import hashlib
import json
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from minunclip.config import PRESETS, STAGES, Preset, TrainingConfig, UpsamplerConfig
from minunclip.data.checker import SceneReader, reader_batch_loss, reader_batches, reader_error, reader_scenes
from minunclip.data.files import build_collection
from minunclip.data.render import render
from minunclip.data.scenes import sample_scenes, twin
from minunclip.data.tokenizer import Tokenizer
from minunclip.data.world import World, build_world, save_array, to_tensor, to_uint8, training_captions, trim
from minunclip.diffusion import Schedule, make_schedule
from minunclip.distributed import first_one_then_all, gather, rank
from minunclip.loading import load_model, load_weights
from minunclip.models.autoregressive_prior import AutoregressivePrior, autoregressive_loss, sample_autoregressive
from minunclip.models.clip import CLIP, contrastive_loss, same_captions
from minunclip.models.decoder import Decoder, decoder_loss, sample_decoder
from minunclip.models.diffusion_prior import DiffusionPrior, LatentScale, prior_loss, sample_prior
from minunclip.models.upsampler import Upsampler, degrade, resize, sample_upsampler, training_pair, upsampler_loss
from minunclip.training import Batch, TrainingError, fit, write_atomically

GRID = 16  # pictures in a sample grid
CHECKER_SCENES = 20_000
SOFT_SHARE = 4  # one in so many pictures that CLIP trains on is a blown-up small one, so that it can judge the decoder's pictures too


def tile(pictures: np.ndarray, columns: int = 8) -> np.ndarray:
    """uint8 (N, H, W, 3) to one picture (rows * H, columns * W, 3); the last row is filled up with white."""
    missing = -len(pictures) % columns
    pictures = np.concatenate([pictures, np.full((missing, *pictures.shape[1:]), 255, np.uint8)])
    return rearrange(pictures, "(rows columns) h w c -> (rows h) (columns w) c", columns=columns)


@dataclass
class Run:
    """One training of the chain: a preset, a folder with one sub-folder a stage, a device, a seed."""

    preset: Preset
    folder: Path
    device: torch.device
    seed: int = 0
    data: Path | None = None  # a folder of your own pictures; without it, the captioned world
    init: Path | None = None  # a folder of weights to start from

    @cached_property
    def world(self) -> World:
        if self.data is None:
            return build_world(self.preset, self.folder / "data", self.seed)
        tokenizer = None if self.init is None else Tokenizer.load(self.init / "tokenizer.json")
        return build_collection(self.preset, self.data, self.folder / "data", self.seed, tokenizer)

    @cached_property
    def clip(self) -> CLIP:
        if not (self.folder / "clip" / "model.safetensors").exists():
            raise TrainingError(f"{self.folder / 'clip'} has no trained CLIP, which this stage needs: run `minunclip train clip` first")
        clip = load_model("clip", self.folder / "clip")
        assert isinstance(clip, CLIP)
        return clip.to(self.device).eval().requires_grad_(False)

    @cached_property
    def image_embeddings(self) -> np.ndarray:
        """z_i of every training picture, float32 (N, d), computed once and kept under the hash of CLIP's weights."""
        digest = hashlib.sha256((self.folder / "clip" / "model.safetensors").read_bytes()).hexdigest()[:12]
        path = self.world.folder / f"image-embeddings-{digest}.npy"
        if not path.exists():
            chunks = np.array_split(np.arange(len(self.world)), max(1, len(self.world) // 500))
            save_array(path, np.concatenate([self._embed(self.world.pictures[chunk]).cpu().numpy() for chunk in chunks]))
        return np.load(path, mmap_mode="r")

    @torch.no_grad()
    def _embed(self, pictures: np.ndarray) -> Tensor:
        return self.clip.encode_image(to_tensor(pictures).to(self.device))

    @cached_property
    def validation(self) -> Batch:
        """Pairs that validation losses are computed on: never trained on, never used for the reported figures. The world has twins too."""
        if self.world.held is not None:
            held = {name: to_tensor(self.world.held[name].copy()).to(self.device) for name in ("pictures", "small")}
            return {**held, "tokens": torch.from_numpy(self.world.held["captions"][:, 0].astype(np.int64)).to(self.device)}
        scenes = sample_scenes(min(256, self.preset.world.validation_scenes), seed=self.seed + 2, held_out=True)
        texts = [row[-1] for row in training_captions(scenes, self.seed + 2)]
        tokens = self.world.tokenizer(texts, self.preset.clip.context_length)[0]
        rng = np.random.default_rng([self.seed, 10])
        pictures = {
            "pictures": render(scenes, self.preset.clip.image_size),
            "twins": render([twin(scene, rng) for scene in scenes], self.preset.clip.image_size),
            "small": render(scenes, self.preset.decoder.image_size),
        }
        return {"tokens": tokens.to(self.device), **{name: to_tensor(array).to(self.device) for name, array in pictures.items()}}

    def draw(self, step: int, size: int, stage: str) -> tuple[np.ndarray, np.random.Generator]:
        """Which examples step `step` of a stage sees: a function of seed, stage and step alone."""
        rng = np.random.default_rng([self.seed, STAGES.index(stage), step])
        return np.sort(rng.integers(len(self.world), size=size)), rng

    def captions(self, index: np.ndarray, rng: np.random.Generator) -> Tensor:
        """One caption of a random level for each scene, (B, L) padded."""
        return torch.from_numpy(self.world.captions[index, rng.integers(self.world.captions.shape[1], size=len(index))].astype(np.int64))


def flip(shape: int, chance: float, device: torch.device) -> Tensor:
    """(shape,) bool, each True with that chance: what classifier-free guidance drops."""
    return torch.rand(shape, device=device) < chance


Loss = Callable[[nn.Module, Batch], Tensor]
Trained = tuple[nn.Module, Callable[[int], Batch], Loss, dict[str, Any]]


def clip_stage(run: Run, settings: TrainingConfig) -> Trained:
    config = run.preset.clip

    def batch(step: int) -> Batch:
        twins = run.world.held is None
        index, rng = run.draw(step, settings.batch_size // (2 if twins else 1), "clip")
        if twins:
            index = np.sort(np.concatenate([index - index % 2, index - index % 2 + 1]))  # each beside its twin
        images = to_tensor(run.world.pictures[index])
        soft = rng.permutation(len(index))[: len(index) // SOFT_SHARE]
        images[soft] = resize(to_tensor(run.world.small[index[soft]]), (config.image_size, config.image_size))
        return {"images": images, "tokens": run.captions(index, rng)}

    def loss(model: nn.Module, data: Batch) -> Tensor:
        assert isinstance(model, CLIP)
        tokens, mask = trim(data["tokens"])
        z_i, z_t = model.encode_image(data["images"]), model.encode_text(tokens, mask)
        return contrastive_loss(gather(z_i), gather(z_t), model.scale(), same_captions(gather(data["tokens"])))

    @torch.no_grad()
    def validate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, CLIP)
        tokens, mask = trim(run.validation["tokens"])
        images, texts = model.encode_image(run.validation["pictures"]), model.encode_text(tokens, mask)
        right = (images @ texts.T).argmax(dim=1) == torch.arange(len(images), device=run.device)
        value = contrastive_loss(images, texts, model.scale(), same_captions(tokens))
        figures = {"validation_loss": value, "retrieval": right.float().mean(), "scale": model.scale()}
        if "twins" in run.validation:
            nearer = (images * texts).sum(dim=1) > (model.encode_image(run.validation["twins"]) * texts).sum(dim=1)
            figures["against_twin"] = nearer.float().mean()
        return {name: float(figure) for name, figure in figures.items()}

    return CLIP(config), batch, loss, {"validate": validate}


def _text(run: Run, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Encoded text, its mask and z_t of padded captions, by the frozen CLIP."""
    tokens, mask = trim(tokens)
    with torch.no_grad():
        encoded, z_t = run.clip.text_features(tokens, mask)
    return encoded, mask, z_t


def _embedding_batch(run: Run, settings: TrainingConfig, stage: str) -> Callable[[int], Batch]:
    def batch(step: int) -> Batch:
        index, rng = run.draw(step, settings.batch_size, stage)
        return {"z_i": torch.from_numpy(run.image_embeddings[index]), "tokens": run.captions(index, rng)}

    return batch


def prior_stage(run: Run, settings: TrainingConfig) -> Trained:
    config = run.preset.prior
    schedule = make_schedule(config.diffusion.schedule, config.diffusion.steps)

    def loss(model: nn.Module, data: Batch) -> Tensor:
        assert isinstance(model, DiffusionPrior)
        z_i = data["z_i"]
        timestep = torch.randint(schedule.steps, (len(z_i),), device=z_i.device)
        drop = flip(len(z_i), config.text_drop, z_i.device)
        encoded, mask, z_t = _text(run, data["tokens"])
        return prior_loss(model, schedule, z_i, encoded, mask, z_t, timestep, torch.randn_like(z_i), drop).mean()

    @torch.no_grad()
    def validate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, DiffusionPrior)
        z_i = run.clip.encode_image(run.validation["pictures"])
        encoded, mask, z_t = _text(run, run.validation["tokens"])
        fixed = torch.Generator().manual_seed(0)
        timestep = torch.randint(schedule.steps, (len(z_i),), generator=fixed).to(z_i.device)
        noise = torch.randn(z_i.shape, generator=fixed).to(z_i)
        value = prior_loss(model, schedule, z_i, encoded, mask, z_t, timestep, noise).mean()
        drawn, _, _ = sample_prior(model, schedule, encoded[:64], mask[:64], z_t[:64], seeds=range(len(z_t[:64])), steps=10)
        return {"validation_loss": float(value), "cosine": float((drawn * z_i[:64]).sum(dim=1).mean())}

    return DiffusionPrior(config), _embedding_batch(run, settings, "prior"), loss, {"validate": validate}


def ar_prior_stage(run: Run, settings: TrainingConfig) -> Trained:
    index, rng = run.draw(0, min(20_000, len(run.world)), "ar-prior")
    z_i = torch.from_numpy(run.image_embeddings[index])
    z_t = torch.cat([_text(run, part.to(run.device))[2].cpu() for part in run.captions(index, rng).split(500)])
    model = AutoregressivePrior.fitted(run.preset.ar_prior, z_i, z_t)

    def loss(model: nn.Module, data: Batch) -> Tensor:
        assert isinstance(model, AutoregressivePrior)
        drop = flip(len(data["z_i"]), model.config.text_drop, data["z_i"].device)
        return autoregressive_loss(model, data["z_i"], *_text(run, data["tokens"]), drop).mean()

    @torch.no_grad()
    def validate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, AutoregressivePrior)
        z_i = run.clip.encode_image(run.validation["pictures"])
        encoded, mask, z_t = _text(run, run.validation["tokens"])
        value = autoregressive_loss(model, z_i, encoded, mask, z_t).mean()
        drawn = sample_autoregressive(model, encoded[:64], mask[:64], z_t[:64], seeds=range(len(z_t[:64])))
        return {"validation_loss": float(value), "cosine": float((drawn * z_i[:64]).sum(dim=1).mean())}

    return model, _embedding_batch(run, settings, "ar-prior"), loss, {"validate": validate}


def _image_loss(schedule: Schedule, images: Tensor) -> tuple[Tensor, Tensor]:
    """A random timestep and noise for each image."""
    return torch.randint(schedule.steps, (len(images),), device=images.device), torch.randn_like(images)


def decoder_stage(run: Run, settings: TrainingConfig) -> Trained:
    config = run.preset.decoder
    schedule = make_schedule(config.diffusion.schedule, config.diffusion.steps)
    scale = LatentScale.for_dim(config.embedding_dim)

    def batch(step: int) -> Batch:
        index, rng = run.draw(step, settings.batch_size, "decoder")
        z_i = torch.from_numpy(run.image_embeddings[index])
        return {"images": to_tensor(run.world.small[index]), "z_i": z_i, "tokens": run.captions(index, rng)}

    def loss(model: nn.Module, data: Batch) -> Tensor:
        assert isinstance(model, Decoder)
        images = data["images"]
        drops = [flip(len(images), chance, images.device) for chance in (config.embedding_drop, config.caption_drop)]
        z_i, (tokens, mask) = scale.scale(data["z_i"]), trim(data["tokens"])
        return decoder_loss(model, schedule, images, z_i, tokens, mask, *_image_loss(schedule, images), *drops).mean()

    @torch.no_grad()
    def validate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Decoder)
        images = run.validation["small"]
        z_i, (tokens, mask) = scale.scale(run.clip.encode_image(run.validation["pictures"])), trim(run.validation["tokens"])
        fixed = torch.Generator().manual_seed(0)
        timestep = torch.randint(schedule.steps, (len(images),), generator=fixed).to(images.device)
        noise = torch.randn(images.shape, generator=fixed).to(images)
        keep = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        return {"validation_loss": float(decoder_loss(model, schedule, images, z_i, tokens, mask, timestep, noise, keep, keep).mean())}

    @torch.no_grad()
    def sample(model: nn.Module) -> np.ndarray:
        assert isinstance(model, Decoder)
        z_i = scale.scale(run.clip.encode_image(run.validation["pictures"][:GRID]))
        tokens, mask = trim(run.validation["tokens"][:GRID])
        drawn = sample_decoder(model, schedule, z_i, tokens, mask, seeds=range(len(z_i)), guidance=2.0)
        real = run.validation["small"][:GRID]
        return tile(np.concatenate([to_uint8(part) for pair in zip(real.split(8), drawn.split(8)) for part in pair]))

    model = Decoder(config)
    model.prepare_from(run.clip, scale.scale(torch.tensor(run.image_embeddings)))
    return model, batch, loss, {"validate": validate, "sample": sample}


def upsampler_stage(run: Run, settings: TrainingConfig, config: UpsamplerConfig, stage: str) -> Trained:
    schedule = make_schedule(config.diffusion.schedule, config.diffusion.steps)
    first = stage == "upsampler1"
    high = run.world.middle if first else run.world.parts

    last = np.arange(len(high) - min(GRID, len(high) // 2), len(high))  # never trained on

    def pairs(index: np.ndarray, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        target = to_tensor(high[index])
        if first:  # a random quarter of a whole picture
            low = resize(target, (config.low_size, config.low_size))
            target, low = training_pair(config, target, low, generator)
        else:  # the world has drawn quarters alone: whole pictures would fill the disk
            low = to_tensor(run.world.parts_small[index])
            low = degrade(config, low, generator)
        return {"images": target, "low": low}

    def batch(step: int) -> Batch:
        rng = np.random.default_rng([run.seed, STAGES.index(stage), step])
        return pairs(rng.integers(last[0], size=settings.batch_size), int(rng.integers(2**31)))

    def loss(model: nn.Module, data: Batch) -> Tensor:
        assert isinstance(model, Upsampler)
        return upsampler_loss(model, schedule, data["images"], data["low"], *_image_loss(schedule, data["images"])).mean()

    @torch.no_grad()
    def validate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Upsampler)
        data = {name: tensor.to(run.device) for name, tensor in pairs(last, 0).items()}
        fixed = torch.Generator().manual_seed(0)
        timestep = torch.linspace(0, schedule.steps - 1, len(last)).long().to(run.device)
        noise = torch.randn(data["images"].shape, generator=fixed).to(data["images"])
        return {"validation_loss": float(upsampler_loss(model, schedule, data["images"], data["low"], timestep, noise).mean())}

    @torch.no_grad()
    def sample(model: nn.Module) -> np.ndarray:
        assert isinstance(model, Upsampler)
        real = to_tensor(high[last[:8]]).to(run.device)
        low = resize(real, (real.shape[2] * config.low_size // config.high_size,) * 2)
        drawn = sample_upsampler(model, schedule, low, seeds=range(len(low)))
        return tile(np.concatenate([to_uint8(images) for images in (resize(low, (real.shape[2],) * 2), drawn, real)]))

    return Upsampler(config), batch, loss, {"validate": validate, "sample": sample}


def checker_stage(run: Run, settings: TrainingConfig) -> Trained:
    scenes = reader_scenes(min(CHECKER_SCENES, run.preset.world.training_scenes), run.seed)

    def validate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, SceneReader)
        return {f"{name}_error": error for name, error in reader_error(model, 256, run.seed + 2, run.preset.decoder.image_size).items()}

    return SceneReader(run.preset.checker), reader_batches(scenes, settings.batch_size, run.seed), reader_batch_loss, {"validate": validate}


def _prepare_files(stage: str, run: Run) -> None:
    """What later steps only read. Where there is no CLIP, or no use in a folder of pictures, this raises, before anything is written."""
    if stage in ("prior", "ar-prior", "decoder"):
        _ = run.clip, run.image_embeddings
    if stage != "checker":
        _ = run.world


def prepare(stage: str, run: Run, settings: TrainingConfig | None = None) -> tuple[TrainingConfig, nn.Module, Callable[[int], Batch], Loss, dict[str, Any]]:
    """What `training.fit` needs for a stage: settings that suit the device, an untrained model on it, batches, the loss, and what to look at."""
    settings = settings or run.preset.training[stage]
    if run.device.type == "cpu" and settings.precision == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        settings = replace(settings, precision="fp32")  # without the instructions bf16 is emulated, and slower
    with first_one_then_all():
        _prepare_files(stage, run)
    torch.manual_seed(run.seed)
    if stage == "clip" and settings.accumulation > 1:
        raise TrainingError("clip: accumulation must be 1, since the contrastive loss compares all pairs of a batch with each other")
    if stage.startswith("upsampler"):
        config = run.preset.upsampler1 if stage == "upsampler1" else run.preset.upsampler2
        model, batch, loss, looks = upsampler_stage(run, settings, config, stage)
    else:
        build = {"clip": clip_stage, "prior": prior_stage, "ar-prior": ar_prior_stage, "decoder": decoder_stage, "checker": checker_stage}[stage]
        model, batch, loss, looks = build(run, settings)
    model = model.to(run.device)
    if stage in ("decoder", "upsampler1", "upsampler2", "checker"):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return settings, model, batch, loss, looks


def commit() -> str:
    """The commit that this code is of, with a plus if files have changed since; "unknown" out of a repository."""
    here = Path(__file__).parent
    try:
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "."], cwd=here, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changed else "")


def train(stage: str, run: Run, *, settings: TrainingConfig | None = None, resume: bool = True, stop_after: int | None = None) -> nn.Module:
    """Trains one stage of STAGES in `run.folder / stage` and returns its moving average."""
    if run.init is not None and rank() == 0:
        for other in STAGES:  # those that are not trained further are used, and packed, as they are; the checker knows the captioned world alone
            if (run.init / other).is_dir() and not (run.folder / other).exists() and (run.data is None or other != "checker"):
                (run.folder / other).mkdir(parents=True)
                for name in ("config.json", "model.safetensors"):
                    shutil.copyfile(run.init / other / name, run.folder / other / name)
    settings, model, batch, loss, looks = prepare(stage, run, settings)
    if run.init is not None:
        load_weights(model, run.init / stage / "model.safetensors")
    config = json.loads(json.dumps(asdict(model.config)))  # type: ignore[call-overload]
    folder = run.folder / stage
    folder.mkdir(parents=True, exist_ok=True)
    if rank() == 0 and not (resume and (folder / "training.pt").exists()):
        facts = {"commit": commit(), "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {run.device}, torch {torch.__version__}"}
        facts |= {name: path.name for name, path in (("data", run.data), ("init", run.init)) if path is not None}
        write_atomically(folder / "provenance.json", lambda path: path.write_text(json.dumps(facts)))
    return fit(model, batch, loss, settings, folder, name=stage, model_config=config, seed=run.seed, resume=resume, stop_after=stop_after, **looks)


def preset_named(name: str) -> Preset:
    """The preset of that name; ValueError with the names there are."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
