"""CLIP: an image tower and a text tower that agree on one embedding. unCLIP is its inverse.

Paper: App. C (ViT-H/16 at 256 x 256 and a causal text transformer); the method is that of Radford et al. 2021.
Differences from the paper: trained with AdamW or Muon, not SAM; on a CPU a few convolutions before the vision transformer; the
loss knows of captions that occur twice in a batch, which is rare on the web and common in a small captioned world.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from minunclip.config import CLIPConfig, TransformerConfig
from minunclip.models.transformer import Transformer

MAX_SCALE = 100.0  # Radford et al. 2021, section 2.5: a larger scale makes training unstable


class CLIP(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        if config.image_size % config.patch_size:
            raise ValueError(f"image_size {config.image_size} is not a multiple of patch_size {config.patch_size}: change one of them")
        self.config = config
        if config.vision is not None:
            self._add_image_tower(config, config.vision)
        text = config.text.width
        self.token_embedding = nn.Embedding(config.vocabulary_size, text)
        self.text_positions = nn.Parameter(0.01 * torch.randn(config.context_length, text))
        self.text_transformer = Transformer(config.text)
        self.text_final_norm = nn.LayerNorm(text)
        self.text_projection = nn.Linear(text, config.embedding_dim, bias=False)

        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # learned as a logarithm; read it with scale()
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        if config.vision is not None:
            nn.init.normal_(self.image_projection.weight, std=config.vision.width**-0.5)
        nn.init.normal_(self.text_projection.weight, std=text**-0.5)

    @classmethod
    def from_openai(cls, weights: str | Path | Mapping[str, Tensor]) -> "CLIP":
        """Published weights of OpenAI, open_clip or Hugging Face: a folder, a .safetensors file, the index of its shards, or a state dict.

        See `interop.clip_from_folder` and `interop.clip_from_state_dict`, which say what ValueError names.
        """
        from minunclip.interop.clip import clip_from_folder, clip_from_state_dict  # which know this class

        return clip_from_state_dict(weights) if isinstance(weights, Mapping) else clip_from_folder(Path(weights))

    def _add_image_tower(self, config: CLIPConfig, transformer: TransformerConfig) -> None:
        vision, patches = transformer.width, (config.image_size // config.patch_size) ** 2
        # A convolution whose stride is its size is a linear map of each patch, and faster so on a CPU.
        convolutions = config.stem == "convolutions"
        self.stem = _convolutions(vision, config.patch_size) if convolutions else nn.Identity()
        self.patch_side = 1 if convolutions else config.patch_size
        self.patch_embedding = nn.Linear((vision if convolutions else 3) * self.patch_side**2, vision, bias=False)
        self.class_token = nn.Parameter(vision**-0.5 * torch.randn(vision))
        self.image_positions = nn.Parameter(vision**-0.5 * torch.randn(1 + patches, vision))
        self.image_pre_norm = nn.LayerNorm(vision)
        self.image_transformer = Transformer(transformer)
        self.image_post_norm = nn.LayerNorm(vision)
        self.image_projection = nn.Linear(vision, config.embedding_dim, bias=False)

    def forward(self, images: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The training loss of one batch, a scalar: images (B, 3, S, S) in [-1, 1], captions (B, L) with their mask."""
        if not self.config.unit_norm:
            raise ValueError("the contrastive loss compares directions: train CLIP with unit_norm")
        return contrastive_loss(self.encode_image(images), self.encode_text(tokens, mask), self.scale(), same_captions(tokens))

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] to float32 embeddings z_i (B, embedding_dim), unit-norm unless the config says otherwise."""
        if self.config.vision is None:
            raise ValueError("this CLIP has a text tower alone, and can embed no picture: load one with its image tower")
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"expected images of shape (B, 3, {size}, {size}), got {tuple(images.shape)}: resize or crop them first")
        x = self.stem(images)
        x = self.patch_embedding(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch_side, q=self.patch_side))
        x = torch.cat([repeat(self.class_token, "d -> b 1 d", b=len(x)).to(x.dtype), x], dim=1) + self.image_positions
        x = self.image_transformer(self.image_pre_norm(x), causal=False)
        return self._embedding(self.image_projection(self.image_post_norm(x[:, 0])))

    def _embedding(self, projected: Tensor) -> Tensor:
        """In float32, since in bfloat16 the norm is off by up to 0.4 %."""
        return F.normalize(projected.float(), dim=-1) if self.config.unit_norm else projected.float()

    def text_features(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Captions to (encoded text (B, L, text width), float32 embeddings z_t (B, embedding_dim), as in `encode_image`).

        `tokens` (B, L) int64 with L up to context_length; `mask` (B, L) is True up to and including the end token, which
        every caption has. Padding stands behind the end token, so causality alone keeps it out of z_t; the encoded text at
        padded positions means nothing: readers mask it.
        """
        length = tokens.shape[1]
        if length > self.config.context_length:
            raise ValueError(f"captions of {length} tokens do not fit into a context of {self.config.context_length}: tokenise with that length")
        x = self.token_embedding(tokens) + self.text_positions[:length]
        encoded = self.text_final_norm(self.text_transformer(x, causal=True))
        end = mask.sum(dim=1) - 1
        at_end = encoded[torch.arange(tokens.shape[0], device=tokens.device), end]
        return encoded, self._embedding(self.text_projection(at_end))

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Captions (B, L) to float32 embeddings z_t (B, embedding_dim); see `text_features`."""
        return self.text_features(tokens, mask)[1]

    def scale(self) -> Tensor:
        """exp(logit_scale), the inverse temperature, at most 100.

        The parameter itself is clamped, as in CLIP's own training: a clamp in the graph would cut the gradient,
        and a scale that once passed 100 could never come back.
        """
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(MAX_SCALE))
        return self.logit_scale.exp()


def _convolutions(width: int, patch_size: int) -> nn.Sequential:
    """(B, 3, S, S) to (B, width, S / patch, S / patch): halves the picture until a patch is one pixel.

    Source: Xiao et al. 2021, "Early convolutions help transformers see better".
    """
    if patch_size < 2 or patch_size & (patch_size - 1):
        raise ValueError(f"patch_size {patch_size} is no power of 2 above 1, which a stem of convolutions needs: use the stem 'patches'")
    halvings = patch_size.bit_length() - 1
    widths = [3, *(width >> (halvings - 1 - i) for i in range(halvings))]
    layers: list[nn.Module] = []
    for width_in, width_out in zip(widths, widths[1:]):
        layers += [nn.Conv2d(width_in, width_out, 3, stride=2, padding=1), nn.GroupNorm(8, width_out), nn.GELU()]
    return nn.Sequential(*layers)


def contrastive_loss(image_embeddings: Tensor, text_embeddings: Tensor, scale: Tensor | float, same: Tensor | None = None) -> Tensor:
    """Which caption belongs to this image, and which image to this caption: the mean of both cross-entropies, a scalar.

    Embeddings (B, d) of unit norm, pair i in row i. `same` (B, B) bool says that captions i and j are the same, by default
    only i and i; the target then spreads evenly over the equals, in both directions: none of them is a wrong answer.
    Where equals have equal embeddings, as here, without dropout, that changes nothing in sum: it is a safeguard.
    Source: Radford et al. 2021, fig. 3.
    """
    with torch.autocast(image_embeddings.device.type, enabled=False):  # at a scale of 100, bfloat16 logits are too coarse
        # logits_ij = s · z_i · z_t^T
        logits = scale * image_embeddings @ text_embeddings.T
        if same is None:
            target = torch.arange(len(logits), device=logits.device)
        else:
            target = same.to(logits.dtype) / same.sum(dim=1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def same_captions(tokens: Tensor) -> Tensor:
    """(B, L) padded captions to (B, B) bool: True where two of them are equal."""
    return (rearrange(tokens, "i l -> i 1 l") == rearrange(tokens, "j l -> 1 j l")).all(dim=-1)


def zero_shot(image_embeddings: Tensor, class_text_embeddings: Tensor, scale: Tensor | float) -> Tensor:
    """Images (B, d) and one text embedding for each class (classes, d), both of unit norm, to probabilities (B, classes)."""
    with torch.autocast(image_embeddings.device.type, enabled=False):
        return (scale * image_embeddings @ class_text_embeddings.T).softmax(dim=-1)
