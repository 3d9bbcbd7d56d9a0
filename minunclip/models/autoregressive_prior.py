"""The autoregressive prior P(z_i | y): the CLIP image embedding as a sequence of quantised principal components.

Paper: section 2.2. z_i is rotated by PCA, components are ordered by descending eigenvalue and cut off where the average squared error is under
1 % (319 of 1,024 in the paper), each is quantised into buckets (1,024), and a causal transformer predicts one after the other. The caption and
z_t are a prefix; a token between prefix and components holds the quantised z_i . z_t, and is drawn from the top half of its distribution when
sampling: this asks for an embedding that fits the caption well.

Differs from the paper: buckets are ordinal and training is short, so a bucket enters as a learned vector and as a number; the cosine token is
predicted by the model itself; samples are put back on the unit sphere.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn import functional as F

from minunclip.config import AutoregressivePriorConfig
from minunclip.models.diffusion_prior import TextCondition, learned_vectors
from minunclip.models.transformer import Cache, Transformer

OUTLIERS = 0.001  # share of the training values beyond either end of a component's range; they fall into its first and last bucket


class PCA(nn.Module):
    """Principal components: mean (d,), components (k, d) as rows by descending eigenvalue, eigenvalues (k,). Buffers, saved with the model."""

    mean: Tensor
    components: Tensor
    eigenvalues: Tensor

    def __init__(self, mean: Tensor, components: Tensor, eigenvalues: Tensor):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)
        self.register_buffer("eigenvalues", eigenvalues)

    def project(self, embedding: Tensor) -> Tensor:
        """(..., d) to coordinates (..., k)."""
        with torch.autocast(embedding.device.type, enabled=False):  # bfloat16 is coarser than a bucket
            return (embedding.float() - self.mean) @ self.components.T

    def reconstruct(self, coordinates: Tensor) -> Tensor:
        """The first n <= k coordinates (..., n) to embeddings (..., d), not normalised."""
        with torch.autocast(coordinates.device.type, enabled=False):
            return coordinates @ self.components[: coordinates.shape[-1]] + self.mean


def fit_pca(embeddings: Tensor, max_components: int, tolerance: float = 0.01) -> PCA:
    """PCA of embeddings (N, d) with the fewest components whose mean squared error is under `tolerance` of the variance.

    If `max_components` do not suffice, that many are kept, with a warning. ValueError if there is nothing to fit.
    """
    values = embeddings.double()
    mean = values.mean(dim=0)
    centred = values - mean
    eigenvalues, vectors = torch.linalg.eigh(centred.T @ centred / len(values))
    eigenvalues, vectors = eigenvalues.flip(0).clamp(min=0), vectors.flip(1)  # eigh sorts them ascending
    variance = eigenvalues.sum()
    if not variance > 1e-12:
        raise ValueError(f"the {len(values)} embeddings do not vary, or are not finite: fit the PCA on the embeddings of many pictures")
    # the error of the first k components is the sum of the eigenvalues left out
    error = 1 - eigenvalues.cumsum(0) / variance
    kept = min(int((error >= tolerance).sum()) + 1, max_components)
    if kept < len(error) and (left := float(error[kept - 1])) >= tolerance:
        warnings.warn(f"{kept} components leave {left:.2%} of the variance, more than {tolerance:.2%}: raise the prior's components", stacklevel=2)
    return PCA(mean.float(), vectors.T[:kept].contiguous().float(), eigenvalues[:kept].float())


class Quantiser(nn.Module):
    """Equal buckets between `low` and `high` (k,), for each of k components by its own range. Buffers, saved with the model."""

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor, buckets: int):
        super().__init__()
        self.buckets = buckets
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def encode(self, values: Tensor) -> Tensor:
        """(..., k) to buckets, int64, 0 .. buckets - 1. Values out of range go to the outermost bucket."""
        position = (values - self.low) / (self.high - self.low)
        return (position * self.buckets).floor().clamp(0, self.buckets - 1).long()

    def decode(self, tokens: Tensor) -> Tensor:
        """Buckets (..., k) to their centres."""
        return self.low + (tokens + 0.5) / self.buckets * (self.high - self.low)


def fit_quantiser(values: Tensor, buckets: int) -> Quantiser:
    """Ranges of training values (N, k), but for the outermost 0.1 % at either end."""
    ends = torch.tensor([OUTLIERS, 1 - OUTLIERS], device=values.device)
    low, high = torch.stack([component.quantile(ends) for component in values.float().unbind(dim=1)], dim=1)  # one by one: quantile is limited in size
    return Quantiser(low, torch.maximum(high, low + 1e-6), buckets)


class AutoregressivePrior(nn.Module):
    """Predicts the tokens of an image embedding: its quantised z_i . z_t, then its quantised principal components.

    `config.components` is the number of components in use. `AutoregressivePrior.fitted` finds it from data; a model
    built from the config alone has an empty codec, to be filled by `load_state_dict`.
    """

    def __init__(self, config: AutoregressivePriorConfig):
        super().__init__()
        self.config = config
        width, k, d = config.transformer.width, config.components, config.embedding_dim
        self.pca = PCA(torch.zeros(d), torch.zeros(k, d), torch.zeros(k))
        self.quantiser = Quantiser(torch.zeros(k), torch.ones(k), config.buckets)
        self.dot_quantiser = Quantiser(torch.zeros(1), torch.ones(1), config.buckets)
        self.condition = TextCondition(d, config.text_width, config.context_length, width)
        self.dot_table = learned_vectors(config.buckets, width)
        self.component_table = learned_vectors(config.buckets, width)
        self.directions = learned_vectors(k + 1, width)
        self.positions = learned_vectors(k + 1, width)
        self.transformer = Transformer(config.transformer)
        self.norm = nn.LayerNorm(width)
        self.to_buckets = nn.Linear(width, config.buckets)

    @classmethod
    def fitted(cls, config: AutoregressivePriorConfig, image_embeddings: Tensor, text_embeddings: Tensor) -> "AutoregressivePrior":
        """An untrained model whose codec is fitted to unit-norm training pairs (N, d), and whose config says how many components it kept."""
        pca = fit_pca(image_embeddings, config.components)
        model = cls(replace(config, components=len(pca.eigenvalues)))
        model.pca = pca
        model.quantiser = fit_quantiser(pca.project(image_embeddings), config.buckets)
        model.dot_quantiser = fit_quantiser((image_embeddings * text_embeddings).sum(dim=1, keepdim=True), config.buckets)
        return model

    @torch.no_grad()
    def encode(self, image_embedding: Tensor, text_embedding: Tensor) -> Tensor:
        """Unit-norm pairs (B, d) to tokens (B, 1 + components): z_i . z_t, then the components by descending eigenvalue."""
        dot = (image_embedding.float() * text_embedding.float()).sum(dim=1, keepdim=True)
        return torch.cat([self.dot_quantiser.encode(dot), self.quantiser.encode(self.pca.project(image_embedding))], dim=1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens of the components (B, components) to unit-norm z_i (B, d)."""
        return F.normalize(self.pca.reconstruct(self.quantiser.decode(tokens)), dim=-1)

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Tokens (B, n) that stand at `start`, `start` + 1 ... to vectors (B, n, width). Token 0 is the dot product."""
        end = start + tokens.shape[1]
        vectors = F.embedding(tokens, self.component_table)
        if start == 0:
            vectors = torch.cat([F.embedding(tokens[:, :1], self.dot_table), vectors[:, 1:]], dim=1)
        # neighbouring buckets mean nearly the same: the bucket's place in (-1, 1), along a direction of the component's own
        level = (2 * tokens + 1) / self.config.buckets - 1
        return vectors + level[..., None] * self.directions[start:end] + self.positions[start:end]

    def forward(self, encoded_text: Tensor, text_mask: Tensor, text_embedding: Tensor, tokens: Tensor, drop: Tensor | None = None) -> Tensor:
        """Encoded text (B, L, text_width), its mask (B, L), z_t (B, d), tokens (B, n) to logits (B, n + 1, buckets), n <= components.

        Logits i are the prediction of token i from the caption and the tokens before it. `drop` (B,) bool: examples without text and z_t.
        """
        prefix, visible = self.condition(encoded_text, text_mask, text_embedding, drop)
        x = torch.cat([prefix, self.embed(tokens)], dim=1)
        x = self.transformer(x, causal=True, key_mask=F.pad(visible, (0, tokens.shape[1]), value=True))
        return self.to_buckets(self.norm(x[:, prefix.shape[1] - 1 :]))


def autoregressive_loss(
    model: AutoregressivePrior,
    image_embedding: Tensor,
    encoded_text: Tensor,
    text_mask: Tensor,
    text_embedding: Tensor,
    drop: Tensor | None = None,
) -> Tensor:
    """Loss per example (B,): mean cross-entropy in nats of the dot-product token and the components. Chance is log(buckets)."""
    tokens = model.encode(image_embedding, text_embedding)
    logits = model(encoded_text, text_mask, text_embedding, tokens[:, :-1], drop)
    return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").mean(dim=1)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sampling: probabilities (B, buckets) and uniform (B,) in [0, 1) to buckets (B,). Larger numbers give larger buckets.

    Numbers in [1/2, 1) alone draw from the top half of the distribution: from its median up.
    """
    device = torch.device("cpu") if probabilities.device.type == "mps" else probabilities.device  # mps has no float64
    cumulative = probabilities.to(device).double().cumsum(dim=-1)
    token = torch.searchsorted(cumulative, uniform.to(device).double()[:, None] * cumulative[:, -1:], right=True)
    return token[:, 0].clamp(max=probabilities.shape[-1] - 1).to(probabilities.device)


@torch.no_grad()
def sample_autoregressive(
    model: AutoregressivePrior,
    encoded_text: Tensor,
    text_mask: Tensor,
    text_embedding: Tensor,
    seeds: Sequence[int],
    guidance: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Draw one unit-norm z_i (B, d) a caption, component by component with cached keys and values.

    `seeds`: one a caption; an embedding depends on its own seed, not on the batch it is in. `guidance` 1 is the conditional model (no null
    pass); it acts on the components. The dot-product token comes from the top half of the conditional model's own distribution, untempered.
    """
    batch = len(encoded_text)
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} captions: give one seed a caption")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} must be above 0: use a small one, such as 0.01, for the likeliest embedding")
    components, device = model.config.components, encoded_text.device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniform = torch.stack([torch.rand(components + 1, generator=generator) for generator in generators]).to(device)

    # with guidance every caption is there twice: as it is, and dropped
    halves = 1 if guidance == 1 else 2
    encoded_text, text_mask, text_embedding = (repeat(x, "b ... -> (halves b) ...", halves=halves) for x in (encoded_text, text_mask, text_embedding))
    drop = torch.arange(halves * batch, device=device) >= batch
    x, visible = model.condition(encoded_text, text_mask, text_embedding, drop)
    visible = F.pad(visible, (0, components), value=True)
    length = x.shape[1]

    cache: Cache = []
    tokens: list[Tensor] = []
    for i in range(components + 1):
        x = model.transformer(x, causal=True, key_mask=visible[:, : length + i], cache=cache)
        logits = model.to_buckets(model.norm(x[:, -1])).float()
        conditional, null = logits[:batch], logits[-batch:]
        if i == 0:
            # the top half of P(z_i . z_t | y): ask for a good match
            token = draw(conditional.softmax(dim=-1), (0.5 + uniform[:, 0] / 2).clamp(max=1 - 2**-24))  # rounded it may be 1
        else:
            # l_u + w (l_c - l_u); without a null pass both are the same
            guided = null + guidance * (conditional - null)
            token = draw((guided / temperature).softmax(dim=-1), uniform[:, i])
        tokens.append(token)
        x = model.embed(repeat(token, "b -> (halves b) 1", halves=halves), start=i)
    return model.decode(torch.stack(tokens[1:], dim=1))
