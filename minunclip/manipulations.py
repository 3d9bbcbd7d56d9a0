"""What can be done with a picture once it is a pair of latents, z_i and x_T: variations, interpolations, text diffs.

Paper: section 3. CLIP's embedding z_i says what the picture is about, the decoder's x_T holds all else. Every function takes small pictures, of the
decoder's own size, and gives such pictures; `UnCLIP.upsample` enlarges them. The decoder is told of no caption here, and is not guided.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from minunclip.pipeline import UnCLIP

STEPS = 250  # the paper: 250 for the decoder


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation of (B, ...), each example a vector: a at share 0, b at 1, along the great circle (Shoemake 1985)."""
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    # sin((1 - share) omega) / sin(omega) a + sin(share omega) / sin(omega) b,  omega the angle between them
    omega = torch.acos((F.normalize(flat_a) * F.normalize(flat_b)).sum(dim=1, keepdim=True).clamp(-1, 1))
    sine = torch.sin(omega)
    together = sine < 1e-4  # no angle to speak of: a straight line
    share_a = torch.where(together, 1 - share, torch.sin((1 - share) * omega) / sine.clamp(min=1e-4))
    share_b = torch.where(together, share, torch.sin(share * omega) / sine.clamp(min=1e-4))
    return (share_a * flat_a + share_b * flat_b).reshape(a.shape)


def reconstruct(model: UnCLIP, images: Tensor, steps: int = STEPS) -> Tensor:
    """Pictures (B, 3, S, S) to latents and back: what is lost is the error of the inversion."""
    return model.revert(*model.invert(images, steps), steps)


def variations(model: UnCLIP, images: Tensor, count: int, eta: float = 1.0, seed: int = 0, steps: int = STEPS) -> Tensor:
    """`count` variations of each picture (section 3.1), (B, count, 3, S, S): decoded from its z_i and x_T by DDIM with eta.

    At eta 0 each is the picture itself, but for the decoder's own error; the larger eta, the more that z_i does not hold is made up anew.
    """
    z_i, x_T = model.invert(images, steps)
    z_i, x_T = (latent.repeat_interleave(count, dim=0) for latent in (z_i, x_T))
    drawn = model.redraw(z_i, x_T, range(seed, seed + len(z_i)), steps, eta)
    return drawn.unflatten(0, (len(images), count))


def interpolate(model: UnCLIP, start: Tensor, end: Tensor, shares: list[float], noise_seed: int | None = None, steps: int = STEPS) -> Tensor:
    """Pictures between `start` and `end` (B, 3, S, S), (B, shares, 3, S, S), along the great circle between their z_i (section 3.2).

    x_T goes along from one picture's to the other's, so that both ends are the pictures, but for the decoder's own error; with `noise_seed` it
    is instead the same noise all the way, and the ends are only alike.
    """
    (z_a, x_a), (z_b, x_b) = model.invert(start, steps), model.invert(end, steps)
    if noise_seed is not None:
        noise = torch.randn(x_a.shape[1:], generator=torch.Generator().manual_seed(noise_seed)).to(x_a)
        x_a = x_b = noise.expand_as(x_a)
    frames = [model.redraw(slerp(z_a, z_b, share), slerp(x_a, x_b, share), range(len(z_a)), steps) for share in shares]
    return torch.stack(frames, dim=1)


def text_diff(model: UnCLIP, images: Tensor, before: list[str], after: list[str], shares: list[float], steps: int = STEPS) -> Tensor:
    """Pictures (B, 3, S, S), described by `before`, turned towards `after` (section 3.3): (B, shares, 3, S, S).

    z_i is rotated towards the difference of the two captions' embeddings, from the same x_T. The paper goes up to a share of 0.25 to 0.5.
    ValueError where the two captions of a picture are one to CLIP, so that there is nothing to turn towards.
    """
    difference = model.read(after).z_t - model.read(before).z_t
    for text, length in zip(before, difference.norm(dim=1).tolist()):
        if length < 1e-3:
            raise ValueError(f"{text!r} is to become the same caption: change a word that CLIP reads")
    z_i, x_T = model.invert(images, steps)
    # z_d = norm(z_t - z_t0);  z_theta = slerp(z_i, z_d, theta)
    z_d = F.normalize(difference, dim=1)
    return torch.stack([model.redraw(slerp(z_i, z_d, share), x_T, range(len(z_i)), steps) for share in shares], dim=1)
