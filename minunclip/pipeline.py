"""The whole of unCLIP: a caption to z_t, to z_i (the prior), to a small picture (the decoder), to a large one (two upsamplers).

Paper: section 2, P(x | y) = P(x | z_i, y) P(z_i | y).
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from minunclip.config import STAGES, DiffusionConfig
from minunclip.data.tokenizer import Tokenizer
from minunclip.data.world import to_uint8, trim
from minunclip.diffusion import OnStep, Schedule, make_schedule
from minunclip.loading import load_model
from minunclip.models.autoregressive_prior import sample_autoregressive
from minunclip.models.decoder import sample_decoder
from minunclip.models.diffusion_prior import LatentScale, sample_prior
from minunclip.models.upsampler import sample_upsampler
from minunclip.training import read_log, save_model

GUIDANCE = 2.0  # of the decoder


class Generated(NamedTuple):
    pictures: dict[int, np.ndarray]  # by side: uint8 (B, side, side, 3)
    candidates: Tensor  # the prior's z_i . z_t, (B, 2); (B, 1) for the autoregressive prior
    image_embeddings: Tensor  # z_i, unit-norm (B, d)
    seconds: dict[str, float]  # by stage


def _schedule(process: DiffusionConfig) -> Schedule:
    return make_schedule(process.schedule, process.steps)


@dataclass
class UnCLIP:
    """The trained models by stage (see config.STAGES) and the tokenizer that they share."""

    models: dict[str, Any]
    tokenizer: Tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu") -> "UnCLIP":
        """Reads a folder with `tokenizer.json` and a sub-folder a stage. ValueError names the file or key that does not fit."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder with weights: run `make weights`, or name another with --weights")
        models: dict[str, Any] = {stage: load_model(stage, folder / stage).to(device) for stage in STAGES}
        try:
            tokenizer = Tokenizer.load(folder / "tokenizer.json")
        except FileNotFoundError:
            raise ValueError(f"{folder / 'tokenizer.json'} is missing: run `make weights`, or copy the folder again") from None
        if len({models[stage].config.embedding_dim for stage in ("clip", "prior", "ar-prior", "decoder")}) > 1:
            raise ValueError(f"{folder}: CLIP, priors and decoder have embeddings of different sizes: they belong to different presets")
        models["prior"].latent_scale.require_same(LatentScale.for_dim(models["decoder"].config.embedding_dim))
        return cls(models, tokenizer)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Writes what `from_pretrained` reads."""
        for stage, model in self.models.items():
            save_model(Path(folder) / stage, model, json.loads(json.dumps(asdict(model.config))), dtype)
        self.tokenizer.save(Path(folder) / "tokenizer.json")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Sides of the pictures of the decoder and of both upsamplers."""
        return self.models["decoder"].config.image_size, self.models["upsampler1"].config.high_size, self.models["upsampler2"].config.high_size

    @torch.inference_mode()
    def generate(
        self,
        captions: Sequence[str],
        prior: Literal["diffusion", "autoregressive"] = "diffusion",
        seed: int | Sequence[int] = 0,
        size: int | None = None,
        guidance: float = GUIDANCE,
        on_step: OnStep | None = None,
    ) -> Generated:
        """Pictures for captions. `seed`: one for each caption, or one for all; a picture depends on its own alone, not on its batch.

        `size`: one of `sizes`, the largest by default. `on_step` sees the decoder's x_0 as it forms.
        """
        size = self.sizes[-1] if size is None else size
        if size not in self.sizes:
            raise ValueError(f"size {size} is not one of {', '.join(map(str, self.sizes))}")
        if prior not in ("diffusion", "autoregressive"):
            raise ValueError(f"prior {prior!r} is not one of diffusion, autoregressive")
        seeds = [seed] * len(captions) if isinstance(seed, int) else list(seed)
        device = next(self.models["clip"].parameters()).device
        seconds: dict[str, float] = {}

        def timed(stage: str, started: float) -> None:
            seconds[stage] = time.perf_counter() - started

        started = time.perf_counter()
        context = self.models["clip"].config.context_length
        tokens, mask = trim(self.tokenizer(list(captions), context)[0].to(device))
        encoded, z_t = self.models["clip"].text_features(tokens, mask)
        timed("text", started)
        started = time.perf_counter()
        if prior == "diffusion":
            model = self.models["prior"]
            z_i, _, candidates = sample_prior(model, _schedule(model.config.diffusion), encoded, mask, z_t, seeds)
        else:
            z_i = sample_autoregressive(self.models["ar-prior"], encoded, mask, z_t, seeds)
            candidates = (z_i * z_t).sum(dim=1, keepdim=True)
        timed("prior", started)
        started = time.perf_counter()
        decoder = self.models["decoder"]
        scaled = LatentScale.for_dim(z_i.shape[1]).scale(z_i)
        images = sample_decoder(decoder, _schedule(decoder.config.diffusion), scaled, tokens, mask, seeds, guidance=guidance, on_step=on_step)
        timed("decoder", started)
        pictures = {self.sizes[0]: to_uint8(images)}
        for stage, side in zip(("upsampler1", "upsampler2"), self.sizes[1:]):
            if size < side:
                break
            started = time.perf_counter()
            model = self.models[stage]
            images = sample_upsampler(model, _schedule(model.config.diffusion), images, seeds)
            pictures[side] = to_uint8(images)
            timed(stage, started)
        return Generated(pictures, candidates, z_i, seconds)


def pack(run: Path, weights: Path) -> None:
    """A training run's folder to a folder that ships: float16 weights, the tokenizer, and a card a stage with its figures."""
    models: dict[str, nn.Module] = {stage: load_model(stage, run / stage) for stage in STAGES}
    tokenizers = sorted((run / "data").glob("world-*/tokenizer.json"))
    if not tokenizers:
        raise ValueError(f"{run / 'data'} has no tokenizer: is this the folder of a training run?")
    for stage, model in models.items():
        save_model(weights / stage, model, json.loads((run / stage / "config.json").read_text()), torch.float16)
        last = read_log(run / stage / "log.jsonl")[-1]
        rows = "".join(f"| {name} | {value:.6g} |\n" for name, value in last.items())
        (weights / stage / "card.md").write_text(
            f"# {stage}\n\nTrained from scratch on the captioned world of `minunclip/data`; it knows nothing else.\n\n| at the end | |\n|---|---|\n{rows}"
        )
    shutil.copy(tokenizers[-1], weights / "tokenizer.json")
