"""The decoder: a diffusion model that turns a CLIP image embedding, and a caption, into an image.

Paper: section 2.1, "Decoder", P(x | z_i, y). The image embedding enters twice: projected and added to the timestep embedding, and projected
into four tokens that follow the caption's, which the U-Net's attention sees. The caption goes through a text transformer of the decoder's
own, as in GLIDE (Nichol et al. 2021), whose last output is added to the timestep embedding too.

Different from the paper: padding is hidden by a mask (GLIDE learns a padding embedding), and a dropped caption is one of which attention
sees nothing, or `null_tokens` (GLIDE encodes an empty one). Two fields of the config help where training is short: `whiten` and `text_start`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from minunclip.config import DecoderConfig
from minunclip.diffusion import Denoiser, OnStep, SamplerName, Schedule, SeededNoise, guide, make_denoiser, sample, training_loss
from minunclip.models.clip import CLIP
from minunclip.models.transformer import Transformer
from minunclip.models.unet import TimestepMLP, UNet

FLOOR = 0.003  # of the largest variance, added to all when whitening
REACH = 3.0  # standard deviations


class Condition(NamedTuple):
    """All that the U-Net is told besides x_t and the timestep; computed once, used at every step of sampling."""

    vector: Tensor  # (B, 4 * unet width), added to the timestep embedding
    context: Tensor  # (B, N, context width): the caption's tokens, those of no caption, if any, then the image embedding's (four in the paper)
    mask: Tensor  # (B, N), True where attention may look


class Whitener(nn.Module):
    """Turns embeddings so that no direction in which they vary speaks louder than another. Buffers, saved with the model.

    An embedding that no picture has, such as a prior's slip or z_t, may lie far out where pictures hardly vary, and would be magnified there:
    in every direction it is brought back to within REACH standard deviations of the embeddings that were fitted.
    """

    mean: Tensor
    matrix: Tensor
    limit: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("matrix", torch.eye(dim))
        self.register_buffer("limit", torch.full((dim,), 1e4))  # none to speak of, and finite in half precision

    def fit(self, embeddings: Tensor) -> None:
        """To embeddings (N, d). Directions with under FLOOR of the largest variance stay quiet: there is little but rounding in them."""
        values = embeddings.double()
        mean = values.mean(dim=0)
        variance, directions = torch.linalg.eigh((values - mean).T @ (values - mean) / len(values))
        spread = (variance.clamp(min=0) + FLOOR * variance.max()).sqrt().clamp(min=1e-6)
        # w = V^T (z - mean) / sqrt(variance)
        self.matrix.copy_(directions / spread)
        self.limit.copy_(REACH * variance.clamp(min=0).sqrt() / spread)
        self.mean.copy_(mean)

    def forward(self, embedding: Tensor) -> Tensor:
        """(B, d) to (B, d), float32."""
        # bfloat16 would round the quiet directions away; the meta device, on which costs are counted, has no precision to choose
        with nullcontext() if embedding.is_meta else torch.autocast(embedding.device.type, enabled=False):
            white = (embedding.float() - self.mean) @ self.matrix
            return white.clamp(-self.limit, self.limit)


class Decoder(nn.Module):
    """Image embedding and caption to image, by diffusion. With `whiten` or `text_start="clip"`, call `prepare_from` before training."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        text_width, embedding_width = config.text.width, 4 * config.unet.width
        self.token_embedding = nn.Embedding(config.vocabulary_size, text_width)
        self.positions = nn.Parameter(torch.zeros(config.context_length, text_width))
        self.text_transformer = Transformer(config.text)
        self.text_norm = nn.LayerNorm(text_width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)

        self.whitener = Whitener(config.embedding_dim) if config.whiten else nn.Identity()
        self.timestep_mlp = TimestepMLP(config.unet.width)
        self.embedding_to_vector = nn.Linear(config.embedding_dim, embedding_width)
        context_width = text_width if config.context_width is None else config.context_width
        projected = config.context_width is not None
        self.text_to_context = nn.Sequential(nn.Linear(text_width, context_width), nn.LayerNorm(context_width)) if projected else nn.Identity()
        self.embedding_to_tokens = nn.Linear(config.embedding_dim, config.context_tokens * context_width)
        self.caption_to_vector = nn.Linear(text_width, embedding_width)
        self.null_embedding = nn.Parameter(torch.zeros(config.embedding_dim))
        self.null_caption = nn.Parameter(torch.zeros(text_width))
        if config.null_tokens:
            self.null_tokens = nn.Parameter(torch.zeros(config.null_tokens, context_width))

        channels_out = 6 if config.diffusion.learned_variance else 3
        self.unet = UNet(config.unet, config.image_size, 3, channels_out, embedding_width, context_width=context_width)

    @torch.no_grad()
    def prepare_from(self, clip: CLIP, embeddings: Tensor) -> None:
        """What the config asks to take over from training so far: CLIP's text transformer, and the spread of the scaled embeddings (N, d).

        ValueError where the text transformers differ in size.
        """
        if isinstance(self.whitener, Whitener):
            self.whitener.fit(embeddings)
        if self.config.text_start == "clip":
            ours, theirs = self.config, clip.config
            if (ours.text, ours.context_length, ours.vocabulary_size) != (theirs.text, theirs.context_length, theirs.vocabulary_size):
                raise ValueError("the decoder's text transformer is to start from CLIP's, but their sizes differ: use the same, or text_start: scratch")
            self.token_embedding.load_state_dict(clip.token_embedding.state_dict())
            self.text_transformer.load_state_dict(clip.text_transformer.state_dict())
            self.text_norm.load_state_dict(clip.text_final_norm.state_dict())
            self.positions.copy_(clip.text_positions)

    def encode_condition(
        self,
        image_embedding: Tensor,
        tokens: Tensor,
        mask: Tensor,
        drop_embedding: Tensor | None = None,
        drop_caption: Tensor | None = None,
    ) -> Condition:
        """image_embedding (B, d), scaled by LatentScale; tokens (B, L) with mask (B, L), True for real ones, which come first.

        drop_embedding and drop_caption (B,): True where the decoder is to be told nothing of it (classifier-free guidance).
        ValueError where the captions are longer than the decoder's context.
        """
        if tokens.shape[1] > self.config.context_length:
            raise ValueError(f"captions of {tokens.shape[1]} tokens, but the decoder reads {self.config.context_length}: tokenize them to that length")
        text = self.token_embedding(tokens) + self.positions[: tokens.shape[1]]
        causal = self.config.text_start == "clip"  # padding comes last: causality alone hides it
        text = self.text_norm(self.text_transformer(text, causal=causal, key_mask=None if causal else mask))
        end = mask.sum(dim=1) - 1
        caption = text[torch.arange(tokens.shape[0], device=text.device), end]  # the output at the end token stands for the whole caption
        context, text_mask = self.text_to_context(text), mask
        if drop_caption is not None:
            caption = torch.where(drop_caption[:, None], self.null_caption.to(caption.dtype), caption)
            text_mask = mask & ~drop_caption[:, None]
            if self.config.null_tokens:
                context = torch.cat([context, repeat(self.null_tokens, "n c -> b n c", b=len(text)).to(context.dtype)], dim=1)
                text_mask = torch.cat([text_mask, repeat(drop_caption, "b -> b n", n=self.config.null_tokens)], dim=1)
        image_embedding = self.whitener(image_embedding)
        if drop_embedding is not None:
            image_embedding = torch.where(drop_embedding[:, None], self.null_embedding.to(image_embedding.dtype), image_embedding)
        vector = self.embedding_to_vector(image_embedding) + self.caption_to_vector(caption)
        image_tokens = rearrange(self.embedding_to_tokens(image_embedding), "b (tokens c) -> b tokens c", tokens=self.config.context_tokens)
        return Condition(
            vector,
            torch.cat([context.to(image_tokens.dtype), image_tokens], dim=1),
            F.pad(text_mask, (0, self.config.context_tokens), value=True),
        )

    def denoise(self, x_t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """One step's network output: x_t (B, 3, S, S) and timestep (B,) to (B, 3, S, S), or (B, 6, S, S) with learned variance."""
        return self.unet(x_t, self.timestep_mlp(timestep) + condition.vector, condition.context, condition.mask)

    def forward(
        self,
        x_t: Tensor,
        timestep: Tensor,
        image_embedding: Tensor,
        tokens: Tensor,
        mask: Tensor,
        drop_embedding: Tensor | None = None,
        drop_caption: Tensor | None = None,
    ) -> Tensor:
        """`denoise` with `encode_condition` of the rest: what training calls."""
        return self.denoise(x_t, timestep, self.encode_condition(image_embedding, tokens, mask, drop_embedding, drop_caption))


def decoder_loss(
    model: Decoder,
    schedule: Schedule,
    x_0: Tensor,
    image_embedding: Tensor,
    tokens: Tensor,
    mask: Tensor,
    timestep: Tensor,
    noise: Tensor,
    drop_embedding: Tensor | None = None,
    drop_caption: Tensor | None = None,
) -> Tensor:
    """The loss (B,) of each image x_0 (B, 3, S, S) in [-1, 1]; other shapes as in `Decoder.encode_condition`."""
    config = model.config.diffusion

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        return model(x_t, t, image_embedding, tokens, mask, drop_embedding, drop_caption)

    return training_loss(schedule, config.objective, config.learned_variance, network, x_0, timestep, noise)


@torch.no_grad()
def decoder_denoiser(
    model: Decoder, schedule: Schedule, image_embedding: Tensor | None, tokens: Tensor | None, mask: Tensor | None, guidance: float = 1.0
) -> Denoiser:
    """The decoder with its condition fixed, for any sampler and for DDIM inversion. The condition is encoded here, once.

    Without an embedding, or without tokens and mask, the decoder is not told of it; ValueError without either. With guidance each step runs
    the images twice in one batch: told everything, and told nothing. Guidance 1 skips the second half.
    """
    config = model.config.diffusion
    if (tokens is None) != (mask is None):
        raise ValueError("a caption is its tokens and their mask: give both, or neither")
    no_embedding, no_caption = image_embedding is None, tokens is None or mask is None
    given = image_embedding if image_embedding is not None else tokens
    if given is None:
        raise ValueError("nothing to draw: give an image embedding, a caption, or both")
    batch, device = len(given), given.device
    # placeholders, which the drops hide
    if image_embedding is None:
        image_embedding = torch.zeros((batch, model.config.embedding_dim), device=device)
    if tokens is None or mask is None:
        tokens, mask = torch.zeros((batch, 1), dtype=torch.int64, device=device), torch.ones((batch, 1), dtype=torch.bool, device=device)
    if guidance == 1:
        drops = [torch.full((batch,), dropped, device=device) for dropped in (no_embedding, no_caption)]
        told = model.encode_condition(image_embedding, tokens, mask, *drops)
        return make_denoiser(lambda x_t, t: model.denoise(x_t, t, told), schedule, config.objective, config.learned_variance)

    dropped = torch.arange(2 * batch, device=device) >= batch
    twice = [torch.cat([x, x]) for x in (image_embedding, tokens, mask)]
    both = model.encode_condition(twice[0], twice[1], twice[2], drop_embedding=dropped | no_embedding, drop_caption=dropped | no_caption)

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = model.denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both).float().chunk(2)
        return guide(conditional, unconditional, guidance, config.learned_variance)

    return make_denoiser(network, schedule, config.objective, config.learned_variance)


@torch.no_grad()
def sample_decoder(
    model: Decoder,
    schedule: Schedule,
    image_embedding: Tensor | None,
    tokens: Tensor | None,
    mask: Tensor | None,
    seeds: Sequence[int],
    steps: int | None = None,
    guidance: float = 1.0,
    sampler: SamplerName | None = None,
    eta: float = 0.0,
    x_T: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Images (B, 3, S, S) in [-1, 1] for scaled image embeddings (B, d) and captions (B, L), or one of them; the model should be in eval mode.

    seeds: one an image; it alone decides the image's noise. Steps and sampler are the config's unless given. x_T (B, 3, S, S): where to start
    in place of noise, and eta the randomness of "ddim" (section 3: inversion and variations). ValueError where the seeds do not fit.
    """
    denoiser = decoder_denoiser(model, schedule, image_embedding, tokens, mask, guidance)
    given = image_embedding if image_embedding is not None else tokens
    if given is None or len(seeds) != len(given):
        raise ValueError(f"{len(seeds)} seeds for {0 if given is None else len(given)} images: give one seed an image")
    config = model.config.diffusion
    noise = SeededNoise(seeds)
    if x_T is None:
        x_T = noise((3, model.config.image_size, model.config.image_size)).to(given.device)
    return sample(denoiser, schedule, x_T, sampler or config.sampler, config.sampling_steps if steps is None else steps, noise.like, eta, on_step)
