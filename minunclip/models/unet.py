"""The ADM U-Net: the network of the decoder and of both upsamplers.

Paper: section 2.1 and App. C, which take it from Dhariwal & Nichol 2021 (ADM: residual blocks that are told the timestep by scale and
shift, and that resample inside themselves) and from GLIDE (Nichol et al. 2021: attention sees the caption's tokens beside the image's own).

Different from the paper: `patch_size` can fold p x p pixels into channels first, so that a small computer works on a coarser grid (1 is the
paper), `fine` adds convolutions on single pixels behind the net, since what patches draw of a small thing does not fit together, and a group
of GroupNorm has 8 channels at least, so that narrow nets have groups too (wide ones: 32 groups, as in the paper).
"""

from typing import Literal, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from minunclip.config import UNetConfig
from minunclip.models.transformer import attend, timestep_embedding

Resample = Literal["up", "down"]
Layer = TypeVar("Layer", bound=nn.Module)


class TimestepMLP(nn.Module):
    """A timestep (B,) as a vector (B, 4 * width) that conditions every residual block."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))

    def forward(self, timestep: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(timestep, self.width).to(next(self.parameters()).dtype))


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, or as many as divide the channels with 8 or more in each."""
    groups = next(g for g in range(max(1, min(32, channels // 8)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def zero_init(layer: Layer) -> Layer:
    """At the start a residual branch adds nothing, and the whole network answers zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def resample(x: Tensor, direction: Resample | None) -> Tensor:
    if direction == "down":
        return F.avg_pool2d(x, 2)
    if direction == "up":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return x


class ResidualBlock(nn.Module):
    """x + conv(silu(modulated norm(conv(silu(norm(x)))))), both branches resampled alike between the first norm and the first conv."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_width: int,
        dropout: float,
        direction: Resample | None = None,
        timestep: Literal["scale_shift", "add"] = "scale_shift",
    ):
        super().__init__()
        self.direction, self.timestep = direction, timestep
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if timestep == "scale_shift":
            self.to_scale_shift = nn.Linear(embedding_width, 2 * out_channels)
        else:
            self.to_shift = nn.Linear(embedding_width, out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, in_channels, H, W) and an activated embedding (B, E) to (B, out_channels, H', W')."""
        h = self.conv1(resample(F.silu(self.norm1(x)), self.direction))
        if self.timestep == "scale_shift":
            scale, shift = rearrange(self.to_scale_shift(embedding), "b (two c) -> two b c 1 1", two=2)
            # AdaGN(h) = norm(h) (1 + scale) + shift
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + rearrange(self.to_shift(embedding), "b c -> b c 1 1"))
        return self.skip(resample(x, self.direction)) + self.conv2(self.dropout(F.silu(h)))


class ContextAttention(nn.Module):
    """Self-attention over the grid, whose keys and values are joined by those of the context's tokens (GLIDE)."""

    def __init__(self, channels: int, head_channels: int, context_width: int | None):
        super().__init__()
        if channels % head_channels:
            raise ValueError(f"{channels} channels are not a multiple of head_channels {head_channels}: change width or head_channels")
        self.heads = channels // head_channels
        self.norm = group_norm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.context_to_kv = None if context_width is None else nn.Linear(context_width, 2 * channels)
        self.to_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None, context_mask: Tensor | None) -> Tensor:
        height = x.shape[2]
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")  # a view when x is channels-last
        q, k, v = rearrange(self.to_qkv(tokens), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        mask = None
        if self.context_to_kv is not None and context is not None:
            context_k, context_v = rearrange(self.context_to_kv(context), "b n (two heads d) -> two b heads n d", two=2, heads=self.heads)
            k, v = torch.cat([context_k, k], dim=2), torch.cat([context_v, v], dim=2)
            if context_mask is not None:  # the grid's own tokens are always visible
                mask = rearrange(F.pad(context_mask, (0, tokens.shape[1]), value=True), "b keys -> b 1 1 keys")
        y = attend(q, k, v, mask)
        y = self.to_out(rearrange(y, "b heads n d -> b n (heads d)"))
        return x + rearrange(y, "b (h w) c -> b c h w", h=height)


class Stage(nn.Module):
    """A residual block, then attention where the grid has it."""

    def __init__(self, block: ResidualBlock, attention: ContextAttention | None = None):
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None, context_mask: Tensor | None) -> Tensor:
        x = self.block(x, embedding)
        return x if self.attention is None else self.attention(x, context, context_mask)


class Refinement(nn.Module):
    """Sees the picture and what the net makes of it, pixel by pixel, and adds what is amiss: at the start, nothing."""

    def __init__(self, in_channels: int, channels: int, out_channels: int, blocks: int, embedding_width: int, timestep: Literal["scale_shift", "add"]):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels + out_channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList([ResidualBlock(channels, channels, embedding_width, 0.0, timestep=timestep) for _ in range(blocks)])
        self.norm_out = group_norm(channels)
        self.conv_out = zero_init(nn.Conv2d(channels, out_channels, 3, padding=1))

    def forward(self, x: Tensor, drawn: Tensor, embedding: Tensor) -> Tensor:
        """(B, in_channels, H, W), (B, out_channels, H, W) and an activated embedding (B, E) to (B, out_channels, H, W)."""
        h = self.conv_in(torch.cat([x, drawn], dim=1).contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            h = block(h, embedding)
        return drawn + self.conv_out(F.silu(self.norm_out(h)))


class UNet(nn.Module):
    """Down: `blocks` residual blocks a level. Up: `blocks + 1`, each given one of the down path's outputs, last made first.

    `image_size` says where attention goes (the grid is image_size / patch_size); a net without attention may leave it None.
    """

    def __init__(
        self,
        config: UNetConfig,
        image_size: int | None,
        in_channels: int,
        out_channels: int,
        embedding_width: int,
        context_width: int | None = None,
    ):
        super().__init__()
        patch, levels = config.patch_size, len(config.multipliers)
        self.patch, self.refined = patch, config.fine > 0
        self.multiple = patch * 2 ** (levels - 1)  # what an image's sides must divide by
        grids = [None if image_size is None else image_size // patch >> level for level in range(levels)]
        if image_size is not None and image_size % self.multiple:
            raise ValueError(f"image_size {image_size} is not a multiple of {self.multiple} (patch_size x 2 per downsampling): change one of them")
        if not set(config.attention_at) <= set(grids):
            raise ValueError(f"attention_at {config.attention_at} names a grid that is not among {grids}: change it, or image_size or patch_size")

        def stage(inputs: int, outputs: int, attend: bool = False, direction: Resample | None = None) -> Stage:
            block = ResidualBlock(inputs, outputs, embedding_width, config.dropout, direction, config.timestep)
            return Stage(block, ContextAttention(outputs, config.head_channels, context_width) if attend else None)

        widths = [config.width * multiplier for multiplier in config.multipliers]
        channels = config.width
        self.conv_in = nn.Conv2d(in_channels * patch**2, channels, 3, padding=1)
        skips = [channels]
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(stage(channels, width, grids[level] in config.attention_at))
                channels = width
                skips.append(channels)
            if level < levels - 1:
                self.down.append(stage(channels, channels, direction="down"))
                skips.append(channels)
        self.middle = nn.ModuleList([stage(channels, channels, bool(config.attention_at)), stage(channels, channels)])
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(stage(channels + skips.pop(), width, grids[level] in config.attention_at))
                channels = width
            if level > 0:
                self.up.append(stage(channels, channels, direction="up"))
        self.norm_out = group_norm(channels)
        self.conv_out = zero_init(nn.Conv2d(channels, out_channels * patch**2, 3, padding=1))
        if config.fine:
            self.refinement = Refinement(in_channels, config.fine, out_channels, config.blocks, embedding_width, config.timestep)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None = None, context_mask: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W).

        embedding (B, E): the timestep and all else that conditions every block. context (B, N, C): tokens that attention sees too;
        context_mask (B, N): True where a token may be seen. ValueError where a side cannot be halved often enough.
        """
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(f"images of {x.shape[2]} x {x.shape[3]} pixels: both sides must be multiples of {self.multiple}; resize or pad them")
        embedding = F.silu(embedding)
        h = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)
        h = self.conv_in(h.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for stage in self.down:
            h = stage(h, embedding, context, context_mask)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, embedding, context, context_mask)
        for stage in self.up:
            assert isinstance(stage, Stage)
            if stage.block.direction is None:
                h = torch.cat([h, skips.pop()], dim=1)
            h = stage(h, embedding, context, context_mask)
        h = self.conv_out(F.silu(self.norm_out(h)))
        h = rearrange(h, "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)
        if self.refined:
            h = self.refinement(x, h, embedding)
        return h.to(x.dtype)
