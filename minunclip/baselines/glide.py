"""GLIDE in small: a diffusion model of pictures that is told of a caption alone, guided without a classifier.

Nichol et al. 2021, "GLIDE: towards photorealistic image generation and editing with text-guided diffusion models". It is what unCLIP's decoder is without
its embedding, so the network is `models.decoder.Decoder` with the embedding dropped every time (`Preset.glide`), trained by `stages.decoder_stage`.
"""

from collections.abc import Sequence

from torch import Tensor

from minunclip.diffusion import schedule_of
from minunclip.models.decoder import Decoder, sample_decoder


def sample_glide(model: Decoder, tokens: Tensor, mask: Tensor, seeds: Sequence[int], guidance: float = 1.0) -> Tensor:
    """Small pictures (B, 3, S, S) in [-1, 1] for captions (B, L) with their mask, one seed each. ValueError where the seeds do not fit."""
    return sample_decoder(model, schedule_of(model.config.diffusion), None, tokens, mask, seeds, guidance=guidance)
