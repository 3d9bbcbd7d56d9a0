"""The two trainings of mini DALL-E: the discrete VAE first, then the transformer that writes its codes. GLIDE's is the decoder's (stages.py)."""

import numpy as np
import torch
from torch import Tensor, nn

from minunclip.baselines.dalle import DALLE, DiscreteVAE, dalle_loss, sample_dalle, vae_loss
from minunclip.config import TrainingConfig
from minunclip.data.world import trim
from minunclip.loading import load_model
from minunclip.runs import GRID, Run, Trained, in_pairs_of_rows
from minunclip.training import Batch, TrainingError

COLDEST = 1 / 16  # the Gumbel-softmax's temperature at the end of the training, as in the source
KL_WEIGHT = 1e-4  # per code, beside a mean square error per pixel value; the source's 6.6 is of sums


def vae_stage(run: Run, settings: TrainingConfig) -> Trained:
    """Small pictures to codes and back."""
    config = run.preset.dalle.vae

    def batch(step: int) -> Batch:
        index, _ = run.draw_for_decoder(step, settings.batch_size, "dalle-vae")
        # from 1 to COLDEST, along a cosine
        share = 0.5 + 0.5 * np.cos(np.pi * min(1.0, step / settings.steps))
        return {"images": run.read(run.world.small, index), "temperature": torch.full((len(index),), COLDEST + (1 - COLDEST) * share)}

    def loss(model: nn.Module, data: Batch) -> Tensor:
        assert isinstance(model, DiscreteVAE)
        return vae_loss(model, data["images"], data["temperature"][0], KL_WEIGHT).mean()

    @torch.no_grad()
    def validate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, DiscreteVAE)
        images = run.validation["small"]
        codes = model.encode(images)
        used = torch.bincount(codes.flatten(), minlength=config.codes) / codes.numel()
        # exp(entropy): how many codes are in use, as if all of these were used alike
        perplexity = torch.exp(-(used * used.clamp(min=1e-12).log()).sum())
        return {"validation_loss": float(((model.decode(codes) - images) ** 2).mean()), "perplexity": float(perplexity)}

    @torch.no_grad()
    def sample(model: nn.Module) -> np.ndarray:
        assert isinstance(model, DiscreteVAE)
        real = run.validation["small"][:GRID]
        again = model.decode(model.encode(real)).clamp(-1, 1)
        return in_pairs_of_rows(real, again)

    return DiscreteVAE(config), batch, loss, {"validate": validate, "sample": sample}


def dalle_stage(run: Run, settings: TrainingConfig) -> Trained:
    """Captions, and then the codes of their pictures, by the run's frozen VAE."""
    if not (run.folder / "dalle-vae" / "model.safetensors").exists():
        raise TrainingError(f"{run.folder / 'dalle-vae'} has no trained VAE, which this stage needs: run `minunclip train dalle-vae` first")
    vae = load_model("dalle-vae", run.folder / "dalle-vae").to(run.device).requires_grad_(False)
    assert isinstance(vae, DiscreteVAE)

    def batch(step: int) -> Batch:
        index, rng = run.draw_for_decoder(step, settings.batch_size, "dalle")
        return {"images": run.read(run.world.small, index), "tokens": run.captions(index, rng)}

    def loss(model: nn.Module, data: Batch) -> Tensor:
        assert isinstance(model, DALLE)
        with torch.no_grad():
            codes = vae.encode(data["images"])
        return dalle_loss(model, *trim(data["tokens"]), codes).mean()

    @torch.no_grad()
    def validate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, DALLE)
        return {"validation_loss": float(dalle_loss(model, *trim(run.validation["tokens"]), vae.encode(run.validation["small"])).mean())}

    @torch.no_grad()
    def sample(model: nn.Module) -> np.ndarray:
        assert isinstance(model, DALLE)
        drawn = sample_dalle(model, vae, *trim(run.validation["tokens"][:GRID]), seeds=range(len(run.validation["tokens"][:GRID])))
        return in_pairs_of_rows(run.validation["small"][:GRID], drawn)

    return DALLE(run.preset.dalle), batch, loss, {"validate": validate, "sample": sample}
