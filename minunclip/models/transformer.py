"""Attention, the pre-norm block and the timestep embedding: shared by every transformer of the package.

Paper: App. C names widths, depths and heads only; the block is the one of GPT-2 and CLIP.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from minunclip.config import TransformerConfig

Cache = list[tuple[Tensor, Tensor]]  # keys and values of the tokens seen so far, a pair for each block


def timestep_embedding(timestep: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of a timestep, as in Ho et al. 2020: (B,) integers or reals to (B, width) in [-1, 1].

    The first half are cosines, the second half sines; frequencies fall geometrically from 1 to almost 1 / max_period.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=timestep.device, dtype=torch.float32) / half)
    angles = timestep.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over (B, heads, tokens, d); `mask` broadcasts to (B, heads, queries, keys), True where a key may be seen.

    `causal` needs as many queries as keys and no mask. Torch's fused kernel does it, but for short sequences in bfloat16 on a CPU: its
    backward pass is two to seven times slower there (torch 2.13) than the three lines that spell attention out.
    """
    queries, keys = q.shape[2], k.shape[2]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or queries * keys > 256**2:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    if causal:
        mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=3) @ v


class Attention(nn.Module):
    """Multi-head self-attention over (B, tokens, width)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}: change one of them")
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, causal: bool, key_mask: Tensor | None = None, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (B, n, width) to (B, n, width), and the keys and values (B, heads, keys, d) of it and of `past`.

        `key_mask` (B, keys) is True where a key may be seen.
        """
        q, k, v = rearrange(self.to_qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mask = None
        queries, keys = q.shape[2], k.shape[2]
        if key_mask is not None:
            mask = rearrange(key_mask, "b keys -> b 1 1 keys")
        if causal and queries > 1 and (mask is not None or queries != keys):
            # query i stands at position keys - queries + i and sees every key up to itself
            below = torch.ones(queries, keys, dtype=torch.bool, device=x.device).tril(keys - queries)
            mask = below if mask is None else mask & below
        y = attend(q, k, v, mask, causal=causal and past is None and mask is None)
        return self.to_out(rearrange(y, "b h n d -> b n (h d)")), (k, v)


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), an approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, config.heads)
        self.norm2 = nn.LayerNorm(width)
        activation = nn.GELU() if config.activation == "gelu" else QuickGELU()
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width))

    def forward(self, x: Tensor, causal: bool, key_mask: Tensor | None = None, past: tuple[Tensor, Tensor] | None = None):
        attended, seen = self.attention(self.norm1(x), causal, key_mask, past)
        x = x + attended
        return x + self.mlp(self.norm2(x)), seen


class Transformer(nn.Module):
    """A stack of blocks. The caller adds positions before and a final norm after."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        for name, parameter in self.named_parameters():
            if name.endswith(("to_out.weight", "mlp.2.weight")):  # GPT-2: the residual stream keeps its size at any depth
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers))
            elif name.endswith(("to_qkv.weight", "mlp.0.weight")):
                nn.init.normal_(parameter, std=config.width**-0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, causal: bool, key_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """(B, tokens, width) to the same. With `cache` (a list, empty at first) only new tokens are passed in.

        The list is filled in place; `key_mask` then covers the cached keys as well: (B, cached + new).
        """
        seen = []
        for i, block in enumerate(self.blocks):
            x, pair = block(x, causal, key_mask, cache[i] if cache else None)
            seen.append(pair)
        if cache is not None:
            cache[:] = seen
        return x
