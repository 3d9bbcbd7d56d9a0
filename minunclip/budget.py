"""What a preset costs before anything is bought: FLOPs, memory and GPU-days of every stage, counted on the meta device, which holds no numbers.

FLOPs are counted in one forward pass of one example, operation by operation, a multiplication and an addition as two. A training step costs three
forward passes (the backward pass is two). Weights, gradients, AdamW's two moments and the moving average are 20 bytes a parameter in float32.
Activations are what the forward pass keeps for the backward one, counted tensor by tensor; checkpointing would trade most of them for a third more time.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from minunclip.config import Preset, TrainingConfig, UpsamplerConfig
from minunclip.loading import MODELS
from minunclip.models.clip import CLIP

BYTES = 20  # a parameter, in training: weights, gradients, two moments, moving average
UTILISATION = 0.4  # of the peak: what a well-kept training reaches
PEAK = 312e12  # FLOP/s: an A100 in bfloat16


class Cost(NamedTuple):
    """One stage of a preset."""

    parameters: int
    forward: int  # FLOPs of one training example
    activations: int  # bytes kept for the backward pass of one training example, in float32
    sampling: int  # FLOPs to draw one picture, without guidance; 0 for CLIP, which draws nothing
    training: float  # FLOPs of all steps

    @property
    def gpu_days(self) -> float:
        """Of one A100 at UTILISATION."""
        return self.training / (PEAK * UTILISATION) / 86_400


def _inputs(config: Any, stage: str, whole: bool) -> tuple[Tensor, ...]:
    """One example on the meta device. Upsamplers learn from quarters, and draw the whole picture."""
    timestep = torch.zeros(1, dtype=torch.int64)
    if isinstance(config, UpsamplerConfig):
        share = 1 if whole else 4
        large, small = (torch.zeros(1, 3, side // share, side // share) for side in (config.high_size, config.low_size))
        return large, timestep, small
    tokens, mask = torch.zeros(1, config.context_length, dtype=torch.int64), torch.ones(1, config.context_length, dtype=torch.bool)
    if stage == "clip":
        return torch.zeros(1, 3, config.image_size, config.image_size), tokens, mask
    z = torch.zeros(1, config.embedding_dim)
    if stage == "decoder":
        return torch.zeros(1, 3, config.image_size, config.image_size), timestep, z, tokens, mask
    encoded = torch.zeros(1, config.context_length, config.text_width)
    if stage == "prior":
        return z, timestep, encoded, mask, z
    return encoded, mask, z, torch.zeros(1, config.components, dtype=torch.int64)


def count(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[int, int]:
    """FLOPs of one forward pass, and the bytes that it keeps for the backward pass (parameters left out)."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}  # by storage: several tensors may be views of one

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if isinstance(model, CLIP):  # its loss compares examples, and costs next to nothing
            output: Any = model.encode_image(inputs[0]), model.encode_text(*inputs[1:])
        else:
            output = model(*inputs)
    del output
    return counter.get_total_flops(), sum(kept.values())


def budget(preset: Preset) -> dict[str, Cost]:
    """The cost of every stage of a preset, by stage; see the head of this module for the formulas."""
    costs = {}
    for stage, config in preset.models.items():
        if stage == "checker":  # no part of unCLIP
            continue
        with torch.device("meta"):
            model = MODELS[stage][0](config)
            forward, activations = count(model, _inputs(config, stage, whole=False))
            whole = count(model, _inputs(config, stage, whole=True))[0]
        if stage in ("clip", "ar-prior"):  # CLIP draws nothing; with cached keys and values the other sees each token once, as in one pass
            calls = int(stage == "ar-prior")
        else:
            calls = config.diffusion.sampling_steps
        settings = preset.training[stage]
        parameters = sum(p.numel() for p in model.parameters())
        costs[stage] = Cost(parameters, forward, activations, whole * calls, 3.0 * forward * settings.batch_size * settings.steps)
    return costs


def memory(cost: Cost, settings: TrainingConfig) -> float:
    """Bytes at the peak of a training step, estimated: the state, and what the examples that are done at once keep (in 16 bits half as much)."""
    at_once = settings.batch_size // settings.accumulation
    return cost.parameters * BYTES + at_once * cost.activations / (1 if settings.precision == "fp32" else 2)


def as_text(preset: Preset) -> str:
    """The budget as a table for a terminal."""
    lines = [f"{'stage':<11} {'parameters':>11} {'forward':>12} {'a picture':>12} {'state':>9} {'activations':>12} {'training':>11} {'A100-days':>10}"]
    for stage, cost in budget(preset).items():
        lines.append(
            f"{stage:<11} {cost.parameters / 1e6:>9,.1f} M {cost.forward / 1e9:>7,.1f} GFLOP {cost.sampling / 1e12:>6,.2f} TFLOP "
            f"{cost.parameters * BYTES / 1e9:>6,.1f} GB {cost.activations / 1e6:>9,.1f} MB {cost.training / 1e18:>8,.1f} EF {cost.gpu_days:>10,.1f}"
        )
    lines.append(f"state: {BYTES} bytes a parameter; activations: of one example, float32; A100-days at {UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s")
    return "\n".join(lines)
