"""The whole of unCLIP: a caption to z_t, to z_i (the prior), to a small picture (the decoder), to a large one (two upsamplers).

Paper: section 2, P(x | y) = P(x | z_i, y) P(z_i | y).
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from minunclip.config import BASELINES, STAGES
from minunclip.data.tokenizer import Tokenizer
from minunclip.data.world import to_uint8, trim
from minunclip.diffusion import Denoiser, OnStep, SamplerName, Schedule, SeededNoise, invert_ddim, revert_ddim, sample_ddim, schedule_of
from minunclip.hub import local_folder, push
from minunclip.loading import config_to_json, file_hash, load_model
from minunclip.models.autoregressive_prior import sample_autoregressive
from minunclip.models.decoder import decoder_denoiser, sample_decoder
from minunclip.models.diffusion_prior import LatentScale, sample_prior
from minunclip.models.upsampler import resize, sample_upsampler
from minunclip.training import save_model

ENTRY = 5  # where pictures enter inversion: noise of 0.018, about the decoder's error on a clean picture; see `diffusion.invert_ddim`
GUIDANCE = 2.0  # of the decoder
PRIOR_GUIDANCE = 1.5  # of the priors
OPTIONAL = ("ar-prior", "checker", *BASELINES)  # stages without which pictures can be drawn
TOGETHER = 4  # pictures that are upsampled at once: more take memory and are no faster
UPSAMPLERS: tuple[Literal["upsampler1", "upsampler2"], ...] = ("upsampler1", "upsampler2")
PriorName = Literal["diffusion", "autoregressive"]
Method = TypeVar("Method", bound=Callable[..., Any])
MODEL_NAMES = {"clip": "CLIP", "prior": "diffusion prior", "ar-prior": "autoregressive prior", "decoder": "decoder"}


class Text(NamedTuple):
    tokens: Tensor  # (B, L), padded with 0
    mask: Tensor  # (B, L), True for real tokens
    encoded: Tensor  # (B, L, width): the outputs of CLIP's text transformer
    z_t: Tensor  # (B, d), unit-norm as everywhere here, but in Karlo


class Generated(NamedTuple):
    pictures: dict[int, np.ndarray]  # by side: uint8 (B, side, side, 3)
    candidates: Tensor  # the prior's z_i . z_t, (B, candidates), two as a rule; (B, 1) for the autoregressive prior
    image_embeddings: Tensor  # z_i, unit-norm (B, d)
    seconds: dict[str, float]  # by stage


def _drawing(method: Method) -> Method:
    """Without gradients; and where the weights are kept in half precision, with autocast, which computes in float32 what has to be."""

    @wraps(method)
    def wrapped(self: "UnCLIP", *arguments: Any, **options: Any) -> Any:
        half = self.dtype in (torch.float16, torch.bfloat16)
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype if half else None, enabled=half):
            return method(self, *arguments, **options)

    return wrapped  # type: ignore[return-value]


SEEDS = 2**30  # a picture has four random streams, and a CPU's generator takes 32 bits of a seed


def require_seed(seed: int) -> None:
    """ValueError for a seed that is out of range."""
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed {seed} is out of range: use 0 to {SEEDS - 1}")


@dataclass
class UnCLIP:
    """The trained models by stage (see config.STAGES and BASELINES; those of OPTIONAL may be missing) and the tokenizer that they share."""

    models: dict[str, Any]
    tokenizer: Tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu") -> "UnCLIP":
        """Reads a folder with `tokenizer.json` and a sub-folder a stage, or the Hub's owner/name. ValueError names the file or key that does not fit."""
        folder = local_folder(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder with weights: run `make weights`, or name another with --weights")
        models: dict[str, Any] = {}
        for stage in STAGES + BASELINES:
            once = stage == "upsampler2" and models["upsampler1"].config.last_step  # Karlo's, which enlarges once
            if not (once or stage in OPTIONAL) or (folder / stage).is_dir():
                models[stage] = load_model(stage, folder / stage).to(device)
        try:
            tokenizer = Tokenizer.load(folder / "tokenizer.json")
        except FileNotFoundError:
            raise ValueError(f"{folder / 'tokenizer.json'} is missing: run `make weights`, or copy the folder again") from None
        require_fit(folder, models, tokenizer)
        return cls(models, tokenizer)

    @classmethod
    def from_karlo(cls, folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> "UnCLIP":
        """Karlo, or another unCLIP of diffusers': a folder in diffusers' layout, of which only safetensors are read.

        Karlo's published weights are 3.42 billion: 6.8 GB in float16, 13.7 GB in float32, beside what drawing takes. It draws 64 and 256 pixels a
        side; diffusers' defaults are a guidance of 8 and a prior_guidance of 4. ValueError names what is missing or does not fit.
        """
        from minunclip.interop.karlo import read_folder

        models, tokenizer = read_folder(Path(folder), dtype)
        require_fit(Path(folder), models, tokenizer)
        return cls({stage: model.to(device) for stage, model in models.items()}, tokenizer)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Writes what `from_pretrained` reads."""
        for stage, model in self.models.items():
            save_model(Path(folder) / stage, model, config_to_json(model.config), dtype)
        self.tokenizer.save(Path(folder) / "tokenizer.json")

    def push_to_hub(self, name: str, private: bool = False) -> str:
        """Uploads what `save_pretrained` writes as the Hub's owner/name; returns the address. For a folder with cards and figures: `minunclip push`."""
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push(Path(folder), name, private)

    @property
    def device(self) -> torch.device:
        return next(self.models["clip"].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.models["clip"].parameters()).dtype

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the pictures of the decoder and of the upsamplers, which are two but in Karlo."""
        return self.models["decoder"].config.image_size, *(self.models[stage].config.high_size for stage in UPSAMPLERS if stage in self.models)

    def size_for(self, asked: int | None) -> int:
        """The size asked for, or the largest; ValueError where it is not one of `sizes`."""
        if asked is not None and asked not in self.sizes:
            raise ValueError(f"size {asked} is not one of {', '.join(map(str, self.sizes))}")
        return asked or self.sizes[-1]

    def seeds_for(self, seed: int | Sequence[int], count: int) -> list[int]:
        """A seed for each of `count` captions; ValueError where there are too few or too many, or one is out of range."""
        seeds = [int(seed)] * count if isinstance(seed, int | np.integer) else list(seed)
        if len(seeds) != count:
            raise ValueError(f"{len(seeds)} seeds for {count} captions: give one for all, or one seed a caption")
        for number in seeds:
            require_seed(number)
        return seeds

    @_drawing
    def read(self, captions: Sequence[str]) -> Text:
        """Captions as every model wants them."""
        if isinstance(captions, str):
            raise ValueError(f"got one string, {captions[:60]!r}: give a list of captions")
        if not captions:
            raise ValueError("nothing to draw: give at least one caption (an empty one will do)")
        clip = self.models["clip"]
        tokens, mask = trim(self.tokenizer(list(captions), clip.config.context_length)[0].to(self.device))
        return Text(tokens, mask, *clip.text_features(tokens, mask))

    def require_prior(self, prior: PriorName) -> None:
        """ValueError for a prior that there is not, or not among these weights."""
        if prior not in get_args(PriorName):
            raise ValueError(f"prior {prior!r} is not one of {', '.join(get_args(PriorName))}")
        if prior == "autoregressive" and "ar-prior" not in self.models:
            raise ValueError("these weights have no autoregressive prior: use --prior diffusion, or train and pack the stage ar-prior")

    @_drawing
    def draw_embeddings(self, text: Text, prior: PriorName, seeds: Sequence[int], guidance: float = PRIOR_GUIDANCE) -> tuple[Tensor, Tensor]:
        """z_i (B, d) from one of the priors, and the z_i . z_t of its candidates, as in `Generated`. Unit-norm, unless the prior is of a CLIP that is not."""
        self.require_prior(prior)
        if prior == "diffusion":
            model = self.models["prior"]
            z_i, _, scores = sample_prior(model, schedule_of(model.config.diffusion), text.encoded, text.mask, text.z_t, seeds, guidance=guidance)
            return z_i, scores
        z_i = sample_autoregressive(self.models["ar-prior"], text.encoded, text.mask, text.z_t, seeds, guidance=guidance)
        return z_i, (z_i * text.z_t).sum(dim=1, keepdim=True)

    @_drawing
    def embed(self, images: Tensor) -> Tensor:
        """z_i (B, d) of pictures (B, 3, H, W) in [-1, 1] of any size, brought to CLIP's own first."""
        clip = self.models["clip"]
        return clip.encode_image(resize(images.to(self.device), (clip.config.image_size,) * 2))

    @_drawing
    def decode(
        self,
        z_i: Tensor | None,
        text: Text | None,
        seeds: Sequence[int],
        guidance: float = GUIDANCE,
        on_step: OnStep | None = None,
        steps: int | None = None,
        sampler: SamplerName | None = None,
    ) -> Tensor:
        """Small pictures (B, 3, S, S) in [-1, 1] for unit-norm z_i (B, d) and captions, or for one of them; see `sample_decoder` for the rest."""
        decoder = self.models["decoder"]
        scaled = None if z_i is None else LatentScale.for_dim(z_i.shape[1]).scale(z_i)
        tokens, mask = (None, None) if text is None else (text.tokens, text.mask)
        return sample_decoder(decoder, schedule_of(decoder.config.diffusion), scaled, tokens, mask, seeds, steps, guidance, sampler, on_step=on_step)

    def _told_of(self, z_i: Tensor) -> tuple[Denoiser, Schedule]:
        """The decoder, told of unit-norm z_i (B, d) alone and not guided, and its schedule."""
        decoder = self.models["decoder"]
        schedule = schedule_of(decoder.config.diffusion)
        return decoder_denoiser(decoder, schedule, LatentScale.for_dim(z_i.shape[1]).scale(z_i), None, None), schedule

    @_drawing
    def invert(self, images: Tensor, steps: int = 250) -> tuple[Tensor, Tensor]:
        """Small pictures (B, 3, S, S) in [-1, 1] as the paper's bipartite latent (section 3): z_i (B, d) by CLIP, and x_T by DDIM inversion."""
        if images.shape[-2:] != (self.sizes[0], self.sizes[0]):
            sides = " x ".join(map(str, images.shape[-2:]))
            raise ValueError(f"pictures of {sides} pixels cannot be inverted: the decoder draws {self.sizes[0]} x {self.sizes[0]}, make them as large")
        z_i = self.embed(images)
        return z_i, invert_ddim(*self._told_of(z_i), images.to(self.device), steps, ENTRY)

    @_drawing
    def revert(self, z_i: Tensor, x_T: Tensor, steps: int = 250) -> Tensor:
        """The pictures whose latents `invert` has found with as many steps, as exactly as the steps are small."""
        return revert_ddim(*self._told_of(z_i), x_T, steps, ENTRY)

    @_drawing
    def redraw(self, z_i: Tensor, x_T: Tensor, seeds: Sequence[int], steps: int = 250, eta: float = 0.0) -> Tensor:
        """Pictures from latents of `invert`, one or both of them changed: DDIM, whose eta says how much noise is drawn anew, one seed a picture."""
        return sample_ddim(*self._told_of(z_i), x_T, steps, SeededNoise(seeds).like, eta, first=ENTRY)

    @_drawing
    def upsample(self, stage: Literal["upsampler1", "upsampler2"], images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1], four times as wide."""
        model = self.models[stage]
        parts = [(images[i : i + TOGETHER], seeds[i : i + TOGETHER]) for i in range(0, len(images), TOGETHER)]
        return torch.cat([sample_upsampler(model, schedule_of(model.config.diffusion), low, numbers) for low, numbers in parts])

    def generate(
        self,
        captions: Sequence[str],
        prior: PriorName = "diffusion",
        seed: int | Sequence[int] = 0,
        size: int | None = None,
        guidance: float = GUIDANCE,
        prior_guidance: float = PRIOR_GUIDANCE,
        on_step: OnStep | None = None,
    ) -> Generated:
        """Pictures for captions. `seed`: one for each caption, or one for all; a picture depends on its own alone, not on its batch
        (but for rounding: single values may differ by 1 of 255).

        `size`: one of `sizes`, the largest by default. `on_step` sees the decoder's x_0 as it forms. A guidance of 1 is none.
        """
        size = self.size_for(size)
        # every stage has noise of its own: z_i must say nothing of the noise that the decoder starts from
        prior_seeds, decoder_seeds, *upsampler_seeds = ([4 * number + k for number in self.seeds_for(seed, len(captions))] for k in range(4))
        times = [time.perf_counter()]
        text = self.read(captions)
        times.append(time.perf_counter())
        z_i, candidates = self.draw_embeddings(text, prior, prior_seeds, prior_guidance)
        times.append(time.perf_counter())
        images = self.decode(z_i, text, decoder_seeds, guidance, on_step)
        times.append(time.perf_counter())
        pictures, stages = {self.sizes[0]: to_uint8(images)}, ["text", "prior", "decoder"]
        for stage, side, own in zip(UPSAMPLERS, self.sizes[1:], upsampler_seeds):
            if size < side:
                break
            images = self.upsample(stage, images, own)
            pictures[side] = to_uint8(images)
            times.append(time.perf_counter())
            stages.append(stage)
        return Generated(pictures, candidates, z_i, {stage: end - start for stage, start, end in zip(stages, times, times[1:])})


def require_fit(folder: Path, models: dict[str, Any], tokenizer: Tokenizer) -> None:
    """ValueError unless the models were made for one another: each may be whole, and yet of another preset."""
    clip, decoder = models["clip"].config, models["decoder"].config
    for stage in models.keys() & MODEL_NAMES.keys():
        config = models[stage].config
        for name, wanted in (("embedding_dim", clip.embedding_dim), ("context_length", clip.context_length), ("text_width", clip.text.width)):
            if getattr(config, name, wanted) != wanted:
                raise ValueError(f"{folder}: the {MODEL_NAMES[stage]} has {name} {getattr(config, name)}, CLIP {wanted}: they belong to different presets")
    low = decoder.image_size
    for stage in (stage for stage in UPSAMPLERS if stage in models):
        if models[stage].config.low_size != low:
            raise ValueError(f"{folder}: {stage} enlarges pictures of {models[stage].config.low_size}, not of {low}: it belongs to another preset")
        low = models[stage].config.high_size
    if len(tokenizer) > min(clip.vocabulary_size, decoder.vocabulary_size):
        raise ValueError(f"{folder / 'tokenizer.json'} has {len(tokenizer)} tokens, more than CLIP or the decoder knows: it belongs to another preset")


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every model that a weights folder has, by stage."""
    paths = {stage: folder / stage / "model.safetensors" for stage in STAGES + BASELINES}
    return {stage: file_hash(path) for stage, path in paths.items() if path.exists()}


def weights_id(folder: Path, without: Sequence[str] = ()) -> str:
    """Twelve digits that stand for all the weights of a folder together, but for those of the stages that are left out."""
    return hashlib.sha256("".join(value for stage, value in hashes(folder).items() if stage not in without).encode()).hexdigest()[:12]
