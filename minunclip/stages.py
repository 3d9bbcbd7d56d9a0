"""Every training: the six of unCLIP, in order, that of its examiner, and GLIDE's. What each learns from, its loss, its validation, its samples.

CLIP first; then, on its frozen embeddings, the two priors and the decoder; the upsamplers and the checker need no CLIP. Every stage is a call of
`training.fit`, and leaves a folder with `config.json`, `model.safetensors` (the moving average), a log, a loss curve and sample pictures: what is drawn
from fixed noise, or, of CLIP and the priors, which pictures their embeddings find.
"""

import json
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minunclip.baselines.stages import dalle_stage, vae_stage
from minunclip.config import LEARNS_FROM, PRESETS, STAGES, DecoderConfig, TrainingConfig, UpsamplerConfig
from minunclip.data.checker import SceneReader, reader_batch_loss, reader_batches, reader_error, reader_scenes
from minunclip.data.streams import Streamed
from minunclip.data.world import Pictures, to_tensor, to_uint8, trim
from minunclip.diffusion import schedule_of
from minunclip.distributed import first_one_then_all, gather, rank
from minunclip.loading import config_to_json, file_hash, load_model, load_weights
from minunclip.models.autoregressive_prior import AutoregressivePrior, autoregressive_loss, sample_autoregressive
from minunclip.models.clip import CLIP, contrastive_loss, same_captions
from minunclip.models.decoder import Decoder, decoder_loss, sample_decoder
from minunclip.models.diffusion_prior import DiffusionPrior, LatentScale, prior_loss, sample_prior
from minunclip.models.upsampler import Upsampler, degrade, resize, sample_upsampler, training_pair, upsampler_loss
from minunclip.runs import GRID, Loss, Run, Trained, everywhere, flip, in_pairs_of_rows, moments, read_ahead, tile
from minunclip.training import Batch, TrainingError, fit, write_atomically

CHECKER_SCENES = 20_000
WHOLE = ("clip", "dalle-vae", "checker")  # never sharded: small, and their losses call parts of them
MOST_FITTED = 100_000  # embeddings that means and spreads are taken of: more tell no more, and would fill the memory
SOFT_SHARE = 4  # one in so many pictures that CLIP trains on is a blown-up small one, so that it can judge the decoder's pictures too


def beside_the_nearest(pictures: Tensor, z_i: Tensor, z: Tensor) -> np.ndarray:
    """What embeddings z (n, d) of the first n captions find: the captions' own pictures, and below each the one whose z_i is nearest to z.

    `pictures` (N, 3, S, S) in [-1, 1] have the embeddings z_i (N, d); the answer is one picture, uint8.
    """
    return in_pairs_of_rows(pictures[: len(z)], pictures[(z @ F.normalize(z_i, dim=1).T).argmax(dim=1)])


def clip_stage(run: Run, settings: TrainingConfig) -> Trained:
    """App. C: pairs, in the captioned world each beside its twin, and the contrastive loss over the whole batch."""
    config = run.preset.clip

    def batch(step: int) -> Batch:
        twins = run.world.held is None
        index, rng = run.draw(step, settings.batch_size // (2 if twins else 1), "clip")
        if twins:
            index = np.sort(np.concatenate([index - index % 2, index - index % 2 + 1]))  # each beside its twin
        images = run.read(run.world.pictures, index)
        soft = rng.permutation(len(index))[: len(index) // SOFT_SHARE]
        images[soft] = resize(run.read(run.world.small, index, soft), (config.image_size, config.image_size))
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

    @torch.no_grad()
    def sample(model: nn.Module) -> np.ndarray:
        assert isinstance(model, CLIP)
        tokens, mask = trim(run.validation["tokens"][:GRID])
        pictures = run.validation["pictures"]
        return beside_the_nearest(pictures, model.encode_image(pictures), model.encode_text(tokens, mask))

    return CLIP(config), batch, loss, {"validate": validate, "sample": sample}


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
    """Section 2.2: z_i of the frozen CLIP from captions, noised at random timesteps."""
    config = run.preset.prior
    schedule = schedule_of(config.diffusion)

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
        told, untold = (prior_loss(model, schedule, z_i, encoded, mask, z_t, timestep, noise, drop).mean() for drop in (None, everywhere(z_i)))
        drawn, _, _ = sample_prior(model, schedule, encoded[:64], mask[:64], z_t[:64], seeds=range(len(z_t[:64])), steps=10)
        return {"validation_loss": float(told), "untold_loss": float(untold), "cosine": float(F.cosine_similarity(drawn, z_i[:64]).mean())}

    @torch.no_grad()
    def sample(model: nn.Module) -> np.ndarray:
        assert isinstance(model, DiffusionPrior)
        encoded, mask, z_t = _text(run, run.validation["tokens"][:GRID])
        drawn, _, _ = sample_prior(model, schedule, encoded, mask, z_t, seeds=range(len(z_t)), steps=10)
        pictures = run.validation["pictures"]
        return beside_the_nearest(pictures, run.clip.encode_image(pictures), drawn)

    model = DiffusionPrior(config)
    model.prepare_from(torch.tensor(run.image_embeddings[:MOST_FITTED]))
    return model, _embedding_batch(run, settings, "prior"), loss, {"validate": validate, "sample": sample}


def ar_prior_stage(run: Run, settings: TrainingConfig) -> Trained:
    """Section 2.2: z_i of the frozen CLIP, one bucket after another. Components and buckets are fitted before the first step."""
    if run.init is not None and not run.clip_is_new:  # its tokens stay what they are
        model = load_model("ar-prior", run.init / "ar-prior")
    else:
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
        told, untold = (autoregressive_loss(model, z_i, encoded, mask, z_t, drop).mean() for drop in (None, everywhere(z_i)))
        drawn = sample_autoregressive(model, encoded[:64], mask[:64], z_t[:64], seeds=range(len(z_t[:64])))
        return {"validation_loss": float(told), "untold_loss": float(untold), "cosine": float((drawn * z_i[:64]).sum(dim=1).mean())}

    @torch.no_grad()
    def sample(model: nn.Module) -> np.ndarray:
        assert isinstance(model, AutoregressivePrior)
        encoded, mask, z_t = _text(run, run.validation["tokens"][:GRID])
        pictures = run.validation["pictures"]
        drawn = sample_autoregressive(model, encoded, mask, z_t, seeds=range(len(z_t)))
        return beside_the_nearest(pictures, run.clip.encode_image(pictures), drawn)

    return model, _embedding_batch(run, settings, "ar-prior"), loss, {"validate": validate, "sample": sample}


def decoder_stage(run: Run, settings: TrainingConfig, config: DecoderConfig, stage: str) -> Trained:
    """The decoder, or GLIDE, which is one that is never told of the embedding.

    On a CLIP that was trained further since the weights to start from, whitening and text transformer begin anew from that CLIP.
    """
    schedule = schedule_of(config.diffusion)
    scale = LatentScale.for_dim(config.embedding_dim)

    def batch(step: int) -> Batch:
        index, rng = run.draw_for_decoder(step, settings.batch_size, stage)
        z_i = torch.from_numpy(run.image_embeddings[index])
        return {"images": run.read(run.world.small, index), "z_i": z_i, "tokens": run.captions(index, rng)}

    def loss(model: nn.Module, data: Batch) -> Tensor:
        assert isinstance(model, Decoder)
        images = data["images"]
        drops = [flip(len(images), chance, images.device) for chance in (config.embedding_drop, config.caption_drop)]
        z_i, (tokens, mask) = scale.scale(data["z_i"]), trim(data["tokens"])
        return decoder_loss(model, schedule, images, z_i, tokens, mask, *moments(schedule, images), *drops).mean()

    @torch.no_grad()
    def validate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Decoder)
        images = run.validation["small"]
        z_i, (tokens, mask) = scale.scale(run.clip.encode_image(run.validation["pictures"])), trim(run.validation["tokens"])
        fixed = torch.Generator().manual_seed(0)
        timestep = torch.randint(schedule.steps, (len(images),), generator=fixed).to(images.device)
        noise = torch.randn(images.shape, generator=fixed).to(images)
        every = everywhere(images)
        never = [every if chance == 1 else ~every for chance in (config.embedding_drop, config.caption_drop)]  # what it never sees it is not told here
        drops = (never, (every, every))
        told, untold = (decoder_loss(model, schedule, images, z_i, tokens, mask, timestep, noise, *drop).mean() for drop in drops)
        return {"validation_loss": float(told), "untold_loss": float(untold)}

    @torch.no_grad()
    def sample(model: nn.Module) -> np.ndarray:
        assert isinstance(model, Decoder)
        z_i = scale.scale(run.clip.encode_image(run.validation["pictures"][:GRID]))
        tokens, mask = trim(run.validation["tokens"][:GRID])
        told = None if config.embedding_drop == 1 else z_i
        drawn = sample_decoder(model, schedule, told, tokens, mask, seeds=range(len(z_i)), guidance=2.0)
        return in_pairs_of_rows(run.validation["small"][:GRID], drawn)

    model = Decoder(config)
    if run.init is not None:
        load_weights(model, run.init / stage / "model.safetensors", may_lack="unet.refinement.")
    if run.init is None or run.clip_is_new:
        model.prepare_from(run.clip, scale.scale(torch.tensor(run.image_embeddings[:MOST_FITTED])))
    return model, batch, loss, {"validate": validate, "sample": sample}


def upsampler_stage(run: Run, settings: TrainingConfig, config: UpsamplerConfig, stage: str) -> Trained:
    """Section 2.1: large pictures, or crops of them, from small ones that are spoiled. The last few are kept for validation."""
    schedule = schedule_of(config.diffusion)
    first = stage == "upsampler1"
    # both are drawn at either size, since in use the low resolution looks drawn too: to reduce the high one would leave it more crisp
    high, small = (run.world.middle, run.world.small) if first else (run.world.parts, run.world.parts_small)
    last = np.arange(len(high) - min(GRID, len(high) // 2), len(high))  # never trained on

    def pairs(index: np.ndarray, seed: int, read: Callable[[Pictures, np.ndarray], Tensor]) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        target, low = read(high, index), read(small, index)
        if first:  # a random crop of a whole picture; of the second the world has drawn crops alone: whole pictures would fill the disk
            target, low = training_pair(config, target, low, generator)
        else:
            low = degrade(config, low, generator)
        return {"images": target, "low": low}

    def batch(step: int) -> Batch:
        index, rng = run.draw(step, settings.batch_size, stage, int(last[0]))
        return pairs(index, int(rng.integers(2**31)), run.read)

    def loss(model: nn.Module, data: Batch) -> Tensor:
        assert isinstance(model, Upsampler)
        return upsampler_loss(model, schedule, data["images"], data["low"], *moments(schedule, data["images"])).mean()

    @torch.no_grad()
    def validate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Upsampler)
        data = {name: tensor.to(run.device) for name, tensor in pairs(last, 0, lambda pictures, rows: to_tensor(pictures[rows])).items()}
        fixed = torch.Generator().manual_seed(0)
        timestep = torch.linspace(0, schedule.steps - 1, len(last)).long().to(run.device)
        noise = torch.randn(data["images"].shape, generator=fixed).to(data["images"])
        return {"validation_loss": float(upsampler_loss(model, schedule, data["images"], data["low"], timestep, noise).mean())}

    @torch.no_grad()
    def sample(model: nn.Module) -> np.ndarray:
        assert isinstance(model, Upsampler)
        real = to_tensor(high[last[:8]]).to(run.device)
        low = to_tensor(small[last[:8]]).to(run.device)
        drawn = sample_upsampler(model, schedule, low, seeds=range(len(low)))
        return tile(np.concatenate([to_uint8(images) for images in (resize(low, (real.shape[2],) * 2), drawn, real)]))

    return Upsampler(config), batch, loss, {"validate": validate, "sample": sample}


def checker_stage(run: Run, settings: TrainingConfig) -> Trained:
    scenes = reader_scenes(min(CHECKER_SCENES, run.preset.world.training_scenes), run.seed)

    def validate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, SceneReader)
        return {f"{name}_error": error for name, error in reader_error(model, 256, run.seed + 2, run.preset.decoder.image_size).items()}

    return SceneReader(run.preset.checker), reader_batches(scenes, settings.batch_size, run.seed), reader_batch_loss, {"validate": validate}


def _require_pairs(run: Run, settings: TrainingConfig) -> None:
    """TrainingError for a batch of CLIP's in which there is nothing to compare."""
    if settings.batch_size < 2:
        raise TrainingError("clip: a batch of 1 has no other caption to tell its own from: use 2 or more")
    if run.data is None and settings.batch_size % 2:
        raise TrainingError(f"clip: each scene stands beside its twin, for which a batch of {settings.batch_size} has no room: use an even one")
    if settings.accumulation > 1:
        raise TrainingError("clip: accumulation must be 1, since the contrastive loss compares all pairs of a batch with each other")


def _prepare_files(stage: str, run: Run) -> None:
    """What later steps only read. Where there is no CLIP, or no use in a folder of pictures, this raises, before anything is written."""
    if stage in ("prior", "ar-prior", "decoder", "glide"):
        _ = run.clip, run.image_embeddings
    if stage != "checker":
        _ = run.world


BUILD = {"clip": clip_stage, "prior": prior_stage, "ar-prior": ar_prior_stage, "checker": checker_stage, "dalle-vae": vae_stage, "dalle": dalle_stage}


def prepare(stage: str, run: Run, settings: TrainingConfig | None = None) -> tuple[TrainingConfig, nn.Module, Callable[[int], Batch], Loss, dict[str, Any]]:
    """What `training.fit` needs for a stage: settings that suit the device, an untrained model on it, batches, the loss, and what to look at."""
    settings = settings or run.preset.training[stage]
    settings = replace(settings, compile=settings.compile and run.device.type != "cpu", sharded=settings.sharded and stage not in WHOLE)
    with first_one_then_all():
        _prepare_files(stage, run)
    torch.manual_seed(run.seed)
    if stage.startswith("upsampler"):
        config = run.preset.upsampler1 if stage == "upsampler1" else run.preset.upsampler2
        model, batch, loss, looks = upsampler_stage(run, settings, config, stage)
    elif stage in ("decoder", "glide"):
        model, batch, loss, looks = decoder_stage(run, settings, run.preset.decoder if stage == "decoder" else run.preset.glide, stage)
    else:
        model, batch, loss, looks = BUILD[stage](run, settings)
    if stage != "checker" and (isinstance(run.world.pictures, Streamed) or run.device.type != "cpu"):
        batch = read_ahead(batch)
    model = model.to(run.device)
    if stage in ("decoder", "glide", "dalle-vae", "upsampler1", "upsampler2", "checker"):
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


def _begin_from(run: Run, init: Path, stage: str) -> None:
    """Copies the models of `init` that the run has not; those that are not trained further are used, and packed, as they are."""
    for other in dict.fromkeys((*STAGES, LEARNS_FROM.get(stage, stage))):
        ours, theirs = (home / other / "model.safetensors" for home in (run.folder, init))
        if not theirs.exists() or (run.data is not None and other in ("checker", "dalle-vae")):  # which know the captioned world alone
            continue
        if not ours.exists() and not (ours.parent / "training.pt").exists():
            ours.parent.mkdir(parents=True, exist_ok=True)
            for name in (*(() if other == stage else ("card.md", "loss.png")), "config.json", "model.safetensors"):  # the model last: it says that all is there
                if theirs.with_name(name).exists():
                    write_atomically(ours.with_name(name), partial(shutil.copyfile, theirs.with_name(name)))
        elif other != stage and ours.read_bytes() != theirs.read_bytes() and not (ours.parent / "training.pt").exists():
            raise TrainingError(f"{run.folder} began from other weights than {init}: give another --out, or delete it to begin anew")


def train(stage: str, run: Run, *, settings: TrainingConfig | None = None, resume: bool = True, **options: Any) -> nn.Module:
    """Trains one stage of STAGES or BASELINES in `run.folder / stage` and returns its moving average; `options` go to `training.fit`."""
    if stage == "clip":
        _require_pairs(run, settings or run.preset.training[stage])
    if run.init is not None and rank() == 0:
        if run.data is not None:
            _ = run.world  # a folder of no use is refused before anything is copied
        with run.alone():
            _begin_from(run, run.init, stage)
    settings, model, batch, loss, looks = prepare(stage, run, settings)
    if run.init is not None and stage not in ("ar-prior", "decoder", "glide"):  # these have seen to it: part of them is fitted to CLIP's embeddings
        load_weights(model, run.init / stage / "model.safetensors")
    config = config_to_json(model.config)
    folder = run.folder / stage
    folder.mkdir(parents=True, exist_ok=True)
    if rank() == 0 and not (resume and (folder / "training.pt").exists()):
        device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device
        facts = {"preset": next((name for name, preset in PRESETS.items() if preset == run.preset), "own"), "commit": commit()}
        facts |= {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}, torch {torch.__version__}"}
        own = Path("emoji") if run.data == run.folder / "emoji" else run.data
        given = {"data": own, "init": run.init, "clip": run.published}  # as they were given; a whole path is nobody else's business
        facts |= {name: path.name if path.is_absolute() else path.as_posix() for name, path in given.items() if path is not None}
        write_atomically(folder / "provenance.json", lambda path: path.write_text(json.dumps(facts)))
    source = file_hash(run.folder / LEARNS_FROM[stage] / "model.safetensors") if stage in LEARNS_FROM else None
    return fit(model, batch, loss, settings, folder, name=stage, model_config=config, seed=run.seed, source=source, resume=resume, **options, **looks)
