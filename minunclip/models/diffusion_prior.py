"""The diffusion prior P(z_i | y): from a caption to the CLIP image embedding of a picture that fits it.

Paper: section 2.2. A decoder-only transformer with a causal mask reads the encoded text, the CLIP text embedding z_t, the timestep and the
noised CLIP image embedding; a last learned token reads them all, and its output predicts the un-noised image embedding (MSE on z_i, not on
the noise). There is no dot-product token as in the autoregressive prior: sample two z_i and keep the one with the higher z_i . z_t.

Differs from the paper: embeddings are scaled by sqrt(d) (see `LatentScale`), samples are put back on the unit sphere where CLIP's embeddings
lie, and sampling uses DPM-Solver++ by default; the paper's Analytic-DPM is there too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from minunclip.config import DiffusionPriorConfig
from minunclip.diffusion import SamplerName, Schedule, SeededNoise, guided_network, make_denoiser, sample, training_loss, x_0_errors
from minunclip.models.transformer import Transformer, timestep_embedding

LATENT_CLIP = 5.0  # scaled embeddings have unit RMS: five standard deviations, where pixels would have [-1, 1]


@dataclass(frozen=True)
class LatentScale:
    """By how much unit-norm embeddings are multiplied before noise is added, or a network reads them.

    A unit-norm embedding has an RMS of 1 / sqrt(d) a dimension, which unit Gaussian noise would drown. sqrt(d) makes it one.
    The paper multiplies by 17.2 at d = 1024, which is 0.5375 sqrt(d), to match the variance of pixels (App. C). Prior and decoder
    share the factor, as they share d.
    """

    factor: float

    @classmethod
    def for_dim(cls, dim: int) -> "LatentScale":
        return cls(math.sqrt(dim))

    def scale(self, embedding: Tensor) -> Tensor:
        """Unit-norm embedding to network input: a new tensor, so that cached embeddings stay what they are."""
        return embedding * self.factor

    def unscale(self, latent: Tensor) -> Tensor:
        return latent / self.factor


class TextCondition(nn.Module):
    """What either prior knows of the caption, as tokens: the encoded text, then z_t. Both can be dropped for classifier-free guidance."""

    def __init__(self, embedding_dim: int, text_width: int, context_length: int, width: int, null_tokens: int = 1):
        super().__init__()
        self.context_length, self.null_tokens = context_length, null_tokens
        self.latent_scale = LatentScale.for_dim(embedding_dim)
        self.text = nn.Linear(text_width, width)
        self.embedding = nn.Linear(embedding_dim, width)
        self.null_text = learned_vectors(width) if null_tokens == 1 else learned_vectors(null_tokens, width)
        self.null_embedding = learned_vectors(width)
        self.positions = learned_vectors(context_length + 1, width)

    def forward(self, encoded_text: Tensor, text_mask: Tensor, text_embedding: Tensor, drop: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encoded text (B, L, text_width), its mask (B, L), unit-norm z_t (B, d), `drop` (B,) bool to tokens (B, L + 1, width) and their mask.

        A dropped caption is its visible null tokens and a null z_t. L may be shorter than the context; if it is longer: ValueError.
        """
        length = encoded_text.shape[1]
        if length > self.context_length:
            raise ValueError(f"the text has {length} tokens, the prior's context only {self.context_length}: truncate it when tokenizing")
        if drop is None:
            drop = torch.zeros_like(text_mask[:, 0])
        kept = text_mask & ~drop[:, None]
        null = self.null_text if self.null_tokens == 1 else F.pad(self.null_text, (0, 0, 0, length - self.null_tokens))
        text = torch.where(kept[..., None], self.text(encoded_text), null)
        embedding = torch.where(drop[:, None], self.null_embedding, self.embedding(self.latent_scale.scale(text_embedding)))
        tokens = torch.cat([text + self.positions[:length], (embedding + self.positions[-1])[:, None]], dim=1)
        place = torch.arange(length, device=kept.device)
        # the first token is always seen, be it null: attention over no key at all is undefined
        seen = kept | (drop[:, None] & (place < self.null_tokens)) | (place == 0)
        return tokens, F.pad(seen, (0, 1), value=True)


def learned_vectors(*shape: int) -> nn.Parameter:
    """Small random vectors, of the size that a freshly initialised linear layer gives its tokens."""
    return nn.Parameter(torch.randn(*shape) * shape[-1] ** -0.5)


class DiffusionPrior(nn.Module):
    """Predicts the un-noised latent, which is the scaled image embedding, from a noised one and the caption.

    With `latent="standardised"` call `prepare_from` before training.
    """

    mean: Tensor
    std: Tensor
    causal = True  # section 2.2; an experiment takes it away

    def __init__(self, config: DiffusionPriorConfig):
        super().__init__()
        self.config = config
        width = config.transformer.width
        self.latent_scale = LatentScale.for_dim(config.embedding_dim)
        self.condition = TextCondition(config.embedding_dim, config.text_width, config.context_length, width, config.null_tokens)
        self.timestep = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.noised = nn.Linear(config.embedding_dim, width)
        self.final = learned_vectors(width)
        self.positions = learned_vectors(3, width)  # timestep, noised embedding, final
        self.transformer = Transformer(config.transformer)
        self.norm = nn.LayerNorm(width)
        self.to_embedding = nn.Linear(width, config.embedding_dim)
        if config.latent == "standardised":
            self.register_buffer("mean", torch.zeros(config.embedding_dim))
            self.register_buffer("std", torch.ones(config.embedding_dim))

    @torch.no_grad()
    def prepare_from(self, embeddings: Tensor) -> None:
        """What the config asks to know of the embeddings (N, d) that it will learn from: their mean and spread."""
        if self.config.latent == "standardised":
            self.mean.copy_(embeddings.mean(dim=0))
            self.std.copy_(embeddings.std(dim=0))

    def to_latent(self, z_i: Tensor) -> Tensor:
        """Image embeddings (B, d) as they are diffused."""
        return self.latent_scale.scale(z_i) if self.config.latent == "scaled" else (z_i - self.mean) / self.std

    @property
    def latent_clip(self) -> float:
        """How far from 0 a guess of the clean latent may be, number by number."""
        return LATENT_CLIP * (self.latent_scale.factor / math.sqrt(self.config.embedding_dim) if self.config.latent == "scaled" else 1.0)

    def from_latent(self, latent: Tensor) -> Tensor:
        """Image embeddings (B, d) from what has been drawn."""
        if self.config.latent == "standardised":
            return latent * self.std + self.mean
        # a direction: CLIP's embeddings are unit-norm, and the decoder has seen no other (this undoes the scale as well)
        return F.normalize(latent, dim=-1)

    def forward(self, noised: Tensor, timestep: Tensor, encoded_text: Tensor, text_mask: Tensor, text_embedding: Tensor, drop: Tensor | None = None) -> Tensor:
        """Noised latent z_i (B, d), timestep (B,), encoded text (B, L, text_width), its mask (B, L), z_t (B, d) as CLIP gives it, to latent z_i (B, d).

        `drop` (B,) bool: examples that go without text and z_t. The noised embedding is never dropped.
        """
        text, visible = self.condition(encoded_text, text_mask, text_embedding, drop)
        time = self.timestep(timestep_embedding(timestep, self.config.transformer.width).to(self.final.dtype))
        noised = self.noised(noised)
        rest = torch.stack([time, noised, self.final.expand_as(noised)], dim=1) + self.positions
        # the paper's order: encoded text, z_t, timestep, noised z_i, final
        x = torch.cat([text, rest], dim=1)
        x = self.transformer(x, causal=self.causal, key_mask=F.pad(visible, (0, 3), value=True))
        return self.to_embedding(self.norm(x[:, -1]))


def prior_loss(
    model: DiffusionPrior,
    schedule: Schedule,
    image_embedding: Tensor,
    encoded_text: Tensor,
    text_mask: Tensor,
    text_embedding: Tensor,
    timestep: Tensor,
    noise: Tensor,
    drop: Tensor | None = None,
) -> Tensor:
    """Loss per example (B,): mean over dimensions of the squared error of the latent z_i. One is the loss of always answering zero.

    Embeddings come as CLIP gives them, (B, d); `noise` is a standard normal of that shape.
    """

    # L = E |f(z_i^(t), t, y) - z_i|^2
    def network(x_t: Tensor, timestep: Tensor) -> Tensor:
        return model(x_t, timestep, encoded_text, text_mask, text_embedding, drop)

    return training_loss(schedule, model.config.diffusion.objective, False, network, model.to_latent(image_embedding), timestep, noise)


@torch.no_grad()
def sample_prior(
    model: DiffusionPrior,
    schedule: Schedule,
    encoded_text: Tensor,
    text_mask: Tensor,
    text_embedding: Tensor,
    seeds: Sequence[int],
    steps: int | None = None,
    guidance: float = 1.0,
    candidates: int | None = None,
    sampler: SamplerName | None = None,
    errors: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `candidates` image embeddings a caption and keep the one that agrees best with z_t.

    Returns the best z_i (B, d), all of them (B, candidates, d), as CLIP gives them, and their z_i . z_t (B, candidates).
    `seeds`: one a caption; a caption's embeddings depend on its own seed, not on the batch it is in. `guidance` 1 is the conditional model.
    Steps, sampler and candidates are those of the config unless given. `errors` turn "ancestral" into the paper's Analytic-DPM: see `prior_errors`.
    """
    candidates = model.config.candidates if candidates is None else candidates
    batch, dim = text_embedding.shape
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} captions: give one seed a caption")
    if candidates < 1:
        raise ValueError(f"candidates is {candidates}: draw at least one embedding a caption")
    seeded = SeededNoise(seeds)

    def noise(like: Tensor) -> Tensor:  # each caption draws the noise of all its candidates from its own seed
        return rearrange(seeded((candidates, dim)), "b c d -> (b c) d").to(like)

    text, mask, z_t = (repeat(x, "b ... -> (b c) ...", c=candidates) for x in (encoded_text, text_mask, text_embedding))
    drop_all = torch.ones_like(mask[:, 0])
    network = guided_network(
        lambda x_t, timestep: model(x_t, timestep, text, mask, z_t),
        lambda x_t, timestep: model(x_t, timestep, text, mask, z_t, drop_all),
        guidance,
    )
    process = model.config.diffusion
    denoiser = make_denoiser(network, schedule, process.objective, clip=model.latent_clip)
    z_i = sample(denoiser, schedule, noise(z_t), sampler or process.sampler, process.sampling_steps if steps is None else steps, noise, errors=errors)
    z_i = rearrange(model.from_latent(z_i), "(b c) d -> b c d", c=candidates)
    scores = (z_i * text_embedding[:, None]).sum(dim=-1)
    best = z_i[torch.arange(batch, device=z_i.device), scores.argmax(dim=1)]
    return best, z_i, scores


@torch.no_grad()
def prior_errors(
    model: DiffusionPrior, schedule: Schedule, image_embedding: Tensor, encoded_text: Tensor, text_mask: Tensor, text_embedding: Tensor, steps: int
) -> list[float]:
    """How far the prior is from the truth at each of `steps` timesteps, on pairs (shapes as in `prior_loss`): what Analytic-DPM needs."""
    denoiser = make_denoiser(
        lambda x_t, t: model(x_t, t, encoded_text, text_mask, text_embedding), schedule, model.config.diffusion.objective, clip=model.latent_clip
    )
    return x_0_errors(denoiser, schedule, model.to_latent(image_embedding), steps)
