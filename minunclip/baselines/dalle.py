"""Mini DALL-E: pictures as words, the system that unCLIP is compared with in Tab. 2.

Source: Ramesh et al. 2021 (arXiv 2102.12092). A discrete VAE turns a picture into a grid of codes (section 2.1: Gumbel-softmax, KL to the
uniform prior); a causal transformer reads the caption's tokens and writes the codes (section 2.2); CLIP reranks samples (section 2.6).

Different from the source: squared error in place of the logit-Laplace likelihood, dense attention in place of sparse (a picture has 64 codes
here, not 1,024), and padding is masked where the source has a token of its own for each padded place.
"""

from collections.abc import Sequence

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from minunclip.config import DALLEConfig, DiscreteVAEConfig
from minunclip.models.autoregressive_prior import draw
from minunclip.models.diffusion_prior import learned_vectors
from minunclip.models.transformer import Cache, Transformer

TEXT_WEIGHT = 1 / 8  # of the caption's tokens in the loss; the picture's have 7/8


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class DiscreteVAE(nn.Module):
    """Pictures to a grid of codes and back."""

    def __init__(self, config: DiscreteVAEConfig):
        super().__init__()
        if config.image_size % config.grid:
            raise ValueError(f"image_size {config.image_size} is not a multiple of grid {config.grid}: change one of them")
        self.config = config
        patch, width = config.image_size // config.grid, config.width
        self.encoder = nn.Sequential(nn.Conv2d(3, width, patch, patch), _Residual(width), _Residual(width), nn.ReLU(), nn.Conv2d(width, config.codes, 1))
        self.decoder = nn.Sequential(
            nn.Conv2d(config.codes, width, 1),
            _Residual(width),
            _Residual(width),
            nn.ReLU(),
            nn.Conv2d(width, 3 * patch**2, 3, padding=1),
            nn.PixelShuffle(patch),
        )

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1] to codes (B, grid * grid), int64, row by row."""
        return rearrange(self.encoder(images).argmax(dim=1), "b h w -> b (h w)")

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, grid * grid) to pictures (B, 3, S, S)."""
        one_hot = F.one_hot(rearrange(codes, "b (h w) -> b h w", h=self.config.grid), self.config.codes)
        return self.decoder(rearrange(one_hot, "b h w k -> b k h w").float())


def vae_loss(model: DiscreteVAE, images: Tensor, temperature: float | Tensor, kl_weight: float) -> Tensor:
    """Loss (B,): mean squared error of the relaxed reconstruction, plus the KL of the codes to the uniform distribution, in nats a code.

    `temperature`: of the Gumbel-softmax; the source anneals it from 1 to 1/16. `kl_weight`: its beta.
    """
    logits = model.encoder(images).float()
    # z = softmax((l + g) / tau),  g = -log(an exponential variable): Gumbel noise
    gumbel = -torch.empty_like(logits).exponential_().log()
    relaxed = ((logits + gumbel) / temperature).softmax(dim=1)
    error = reduce((model.decoder(relaxed) - images) ** 2, "b c h w -> b", "mean")
    # KL(q || uniform) = sum_k q_k (log q_k + log K)
    log_q = logits.log_softmax(dim=1)
    kl = reduce((log_q.exp() * (log_q + torch.log(torch.tensor(float(model.config.codes))))).sum(dim=1), "b h w -> b", "mean")
    return error + kl_weight * kl


class DALLE(nn.Module):
    """The transformer that reads a caption and writes a picture's codes."""

    def __init__(self, config: DALLEConfig):
        super().__init__()
        self.config = config
        width, grid = config.transformer.width, config.vae.grid
        self.text = nn.Embedding(config.vocabulary_size, width)
        self.codes = nn.Embedding(config.vae.codes, width)
        self.start = learned_vectors(width)  # stands between caption and picture
        self.text_positions = learned_vectors(config.context_length, width)
        self.rows, self.columns = learned_vectors(grid, 1, width), learned_vectors(1, grid, width)
        self.transformer = Transformer(config.transformer)
        self.norm = nn.LayerNorm(width)
        self.to_text = nn.Linear(width, config.vocabulary_size)
        self.to_codes = nn.Linear(width, config.vae.codes)

    def read(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Captions (B, L) with their mask to input vectors (B, L + 1, width), the start of the picture included, and their mask."""
        x = self.text(tokens) + self.text_positions[: tokens.shape[1]]
        start = self.start.expand(len(x), 1, -1)
        first = torch.arange(tokens.shape[1], device=mask.device) == 0  # the first token is always seen
        return torch.cat([x, start], dim=1), F.pad(mask | first, (0, 1), value=True)

    def place(self, codes: Tensor, start: int = 0) -> Tensor:
        """Codes (B, n) that stand at `start`, … of the picture to vectors (B, n, width)."""
        positions = rearrange(self.rows + self.columns, "h w c -> (h w) c")
        return self.codes(codes) + positions[start : start + codes.shape[1]]

    def forward(self, tokens: Tensor, mask: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Captions (B, L), mask (B, L), codes (B, n) to logits of the caption's next tokens (B, L, vocabulary) and of the codes (B, n, codes)."""
        text, visible = self.read(tokens, mask)
        x = torch.cat([text, self.place(codes[:, :-1])], dim=1)
        x = self.norm(self.transformer(x, causal=True, key_mask=F.pad(visible, (0, codes.shape[1] - 1), value=True)))
        length = tokens.shape[1]
        return self.to_text(x[:, :length]), self.to_codes(x[:, length:])


def dalle_loss(model: DALLE, tokens: Tensor, mask: Tensor, codes: Tensor) -> Tensor:
    """Loss (B,) in nats: 1/8 of the mean over the caption's tokens, 7/8 of that over the picture's."""
    text, picture = model(tokens, mask, codes)
    following = mask[:, 1:]  # a real token is predicted from the one before it
    of_text = F.cross_entropy(text[:, :-1].mT, tokens[:, 1:], reduction="none") * following
    of_text = of_text.sum(dim=1) / following.sum(dim=1).clamp(min=1)
    of_picture = F.cross_entropy(picture.mT, codes, reduction="none").mean(dim=1)
    return TEXT_WEIGHT * of_text + (1 - TEXT_WEIGHT) * of_picture


@torch.no_grad()
def sample_dalle(model: DALLE, vae: DiscreteVAE, tokens: Tensor, mask: Tensor, seeds: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Pictures (B, 3, S, S) in [-1, 1] for captions (B, L), code by code with cached keys and values; one seed a picture."""
    if len(seeds) != len(tokens):
        raise ValueError(f"{len(seeds)} seeds for {len(tokens)} captions: give one seed a caption")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} must be above 0: use a small one, such as 0.01, for the likeliest picture")
    count = model.config.vae.grid**2
    uniform = torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(tokens.device)
    x, visible = model.read(tokens, mask)
    length, visible = x.shape[1], F.pad(visible, (0, count), value=True)
    cache: Cache = []
    codes: list[Tensor] = []
    for i in range(count):
        x = model.transformer(x, causal=True, key_mask=visible[:, : length + i], cache=cache)
        logits = model.to_codes(model.norm(x[:, -1])).float()
        codes.append(draw((logits / temperature).softmax(dim=-1), uniform[:, i]))
        x = model.place(codes[-1][:, None], start=i)
    return vae.decode(torch.stack(codes, dim=1)).clamp(-1, 1)
