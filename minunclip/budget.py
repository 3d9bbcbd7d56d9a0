"""What a preset costs before anything is bought: FLOPs, memory and GPU-days of every stage, counted on the meta device, which holds no numbers.

FLOPs are counted in one forward pass of one example, operation by operation, a multiplication and an addition as two. A training step costs three
forward passes (the backward pass is two). Weights, gradients, AdamW's two moments and the moving average are 20 bytes a parameter in float32.
Activations are what the forward pass keeps for the backward one, counted tensor by tensor. With `recompute` a layer keeps its input alone, and the one
whose turn it is in the backward pass all it needs, for one more forward pass. Many GPUs add what they say to each other: see `step_seconds`.
The formulas, and the paper's budget, stand in docs/budget.md.
"""

import copy
import time
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from minunclip.config import Preset, TrainingConfig, UpsamplerConfig
from minunclip.distributed import layers
from minunclip.loading import MODELS
from minunclip.models.clip import CLIP
from minunclip.models.decoder import Decoder
from minunclip.training import autocast, compile_stacks, make_optimizers, recompute, update_ema

BYTES = 20  # a parameter, in training: weights, gradients, two moments, moving average
WEIGHT = 4  # of these
UTILISATION = 0.4  # of the peak: what a well-kept training reaches
PEAK = 312e12  # FLOP/s: an A100 in bfloat16
OVERLAP = 0.5  # the share of the computing behind which a sharded model's gathering hides; a whole model's gradients are added up at the end
A_MACHINE = 8  # GPUs
NVLINK = 220e9  # bytes a second that a GPU passes on round a ring within its machine
NETWORKS = {"8 x 200 Gb/s InfiniBand": 160e9, "100 Gb/s Ethernet": 10e9}  # bytes a second from machine to machine, 80 % of the wire
STATED = {"prior": "1B", "ar-prior": "1B", "decoder": "3.5B", "upsampler1": "700M", "upsampler2": "300M"}  # the paper's parameters, Tab. 3


class Cost(NamedTuple):
    """One stage of a preset."""

    parameters: int
    forward: int  # FLOPs of one training example
    activations: int  # bytes kept for the backward pass of one training example, in float32
    in_16_bits: int  # the same under autocast: half, but for a U-Net, whose norms autocast computes in float32, and so keeps what they read and give
    sampling: int  # FLOPs to draw one picture, all candidates, without guidance (which doubles them); 0 for CLIP, which draws nothing
    training: float  # FLOPs of all steps

    @property
    def gpu_days(self) -> float:
        """Of one A100 at UTILISATION."""
        return self.training / (PEAK * UTILISATION) / 86_400


def _inputs(config: Any, stage: str, whole: bool) -> tuple[Tensor, ...]:
    """One example on the meta device. Upsamplers learn from crops, and draw the whole picture."""
    timestep = torch.zeros(1, dtype=torch.int64)
    if isinstance(config, UpsamplerConfig):
        share = 1 if whole else config.crop
        large, small = (torch.zeros(1, 3, side // share, side // share) for side in (config.high_size, config.low_size))
        return large, timestep, small
    tokens, mask = torch.zeros(1, config.context_length, dtype=torch.int64), torch.ones(1, config.context_length, dtype=torch.bool)
    if stage == "clip":
        return torch.zeros(1, 3, config.image_size, config.image_size), tokens, mask
    z = torch.zeros(1, config.embedding_dim)
    if stage in ("decoder", "glide"):
        return torch.zeros(1, 3, config.image_size, config.image_size), timestep, z, tokens, mask
    encoded = torch.zeros(1, config.context_length, config.text_width)
    if stage == "prior":
        return z, timestep, encoded, mask, z
    return encoded, mask, z, torch.zeros(1, config.components, dtype=torch.int64)


def sample_inputs(stage: str, config: Any, count: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """Random numbers in the shape of so many training examples: what a model's `forward` takes."""
    inputs = [tensor.expand(count, *tensor.shape[1:]).to(device) for tensor in _inputs(config, stage, whole=False)]
    return tuple(torch.randn_like(tensor) if tensor.is_floating_point() else tensor for tensor in inputs)


def _output(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if isinstance(model, CLIP):  # its loss compares examples, and costs next to nothing
        return model.encode_image(inputs[0]), model.encode_text(*inputs[1:])
    return (model(*inputs),)


def count(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[int, int, int]:
    """FLOPs of one forward pass, bytes that it keeps for the backward pass, parameters left out, and bytes of these with `recompute`."""
    seen = {parameter.untyped_storage()._cdata for parameter in model.parameters()}  # by storage: several tensors may be views of one
    alive: list[Any] = []  # lest the address of one be given to another
    kept: Counter[nn.Module | None] = Counter()  # bytes by layer, None outside of all
    entered: set[int] = set()
    within: list[nn.Module | None] = [None]
    entries = 0

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(storage)
            kept[within[0]] += storage.nbytes()
        return tensor

    def enter(layer: nn.Module, given: tuple[Any, ...]) -> None:
        nonlocal entries
        within[0] = layer
        storage = given[0].untyped_storage()
        if storage._cdata not in entered:
            entered.add(storage._cdata)
            alive.append(storage)
            entries += storage.nbytes()

    def leave(layer: nn.Module, given: tuple[Any, ...], result: Any) -> None:
        within[0] = None

    hooks = [hook for layer in layers(model) for hook in (layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave))]
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = _output(model, inputs)
    del output
    for hook in hooks:
        hook.remove()
    largest = max((size for layer, size in kept.items() if layer is not None), default=0)
    return counter.get_total_flops(), sum(kept.values()), kept[None] + entries + largest


@cache
def _counted(stage: str, config: Any) -> tuple[int, int, int, int, int, int]:
    """Parameters; `count` of what a model sees of one example in training; and the FLOPs of one of its calls in sampling, and of what it does once."""
    with torch.device("meta"):
        model = MODELS[stage][0](config)
        seen, inputs, once = count(model, _inputs(config, stage, whole=False)), _inputs(config, stage, whole=True), 0
        if isinstance(model, Decoder):  # which reads the caption before the first step
            with FlopCounterMode(display=False) as counter:
                model.encode_condition(*inputs[2:])
            once = counter.get_total_flops()
        return sum(p.numel() for p in model.parameters()), *seen, count(model, inputs)[0] - once, once


def cost(stage: str, config: Any, settings: TrainingConfig) -> Cost:
    """The cost of one stage; see the head of this module for the formulas."""
    parameters, forward, plain, recomputed, call, once = _counted(stage, config)
    if stage in ("clip", "ar-prior"):  # CLIP draws nothing; with cached keys and values the other sees each token once, as in one pass
        calls = int(stage == "ar-prior")
    else:
        calls = config.diffusion.sampling_steps * getattr(config, "candidates", 1)
    training = (3.0 + settings.recompute) * forward * settings.batch_size * settings.steps
    kept = recomputed if settings.recompute else plain
    return Cost(parameters, forward, kept, kept if hasattr(config, "unet") else kept // 2, call * calls + once, training)


def budget(preset: Preset) -> dict[str, Cost]:
    """The cost of every stage of unCLIP, by stage."""
    return {stage: cost(stage, config, preset.training[stage]) for stage, config in preset.models.items() if stage != "checker"}


def memory(cost: Cost, settings: TrainingConfig, gpus: int = 1) -> float:
    """Bytes at the peak of a training step on each of so many GPUs, estimated: the state, and what the examples that are done at once keep.

    Sharded, a GPU has its share of the state, and the first one the average that is looked at as well.
    """
    at_once = settings.batch_size // settings.accumulation // gpus
    state = cost.parameters * (BYTES / gpus + WEIGHT if settings.sharded and gpus > 1 else BYTES)
    return state + at_once * (cost.activations if settings.precision == "fp32" else cost.in_16_bits)


def step_seconds(cost: Cost, settings: TrainingConfig, gpus: int, network: float) -> float:
    """One step of the whole batch on so many A100s, eight a machine, of which `network` bytes a second go from each to the next; an estimate."""
    computing = cost.training / settings.steps / (gpus * PEAK * UTILISATION)
    # a ring passes (n - 1) / n of the parameters n times round for a gather, a scatter of sums costs as much, and an all-reduce is one of each
    lap = (gpus - 1) / gpus * cost.parameters * WEIGHT / (NVLINK if gpus <= A_MACHINE else min(NVLINK, network))
    if settings.sharded:  # gathered for the forward and for the backward pass, then scattered, in every part of the batch
        return computing + max(0.0, 3 * settings.accumulation * lap - OVERLAP * computing)
    return computing + 2 * lap


def measure(stage: str, config: Any, settings: TrainingConfig, device: torch.device, steps: int = 3) -> tuple[int, float]:
    """What `memory` estimates, as the CUDA allocator has it (bytes; 0 elsewhere), and examples a second: of a few steps on random numbers."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = MODELS[stage][0](config).to(device).train()
    average = copy.deepcopy(model).requires_grad_(False)
    if settings.recompute:
        recompute(model)
    if settings.compile:
        compile_stacks(model)
    optimizers = make_optimizers(model, settings)
    inputs = sample_inputs(stage, config, settings.batch_size // settings.accumulation, device)
    start = 0.0
    for step in range(-1, steps):  # the first one warms up
        if step == 0:
            start = time.perf_counter()
        for _ in range(settings.accumulation):
            with autocast(device, settings.precision):
                loss = sum(output.float().square().mean() for output in _output(model, inputs))
            torch.as_tensor(loss).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_ema(average, model, step + 1, settings.ema_decay)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    speed = steps * settings.batch_size / (time.perf_counter() - start)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0, speed


def one_gpu_as_markdown(preset: Preset) -> str:
    """What every stage of unCLIP is trained with on one GPU, and what that takes, as it is and with `recompute`."""
    lines = ["| stage | parameters | batch | in parts of | precision | memory | with --recompute | A100-days |", "|---|---|---|---|---|---|---|---|"]
    for stage, one in budget(preset).items():
        settings = preset.training[stage]
        again = replace(settings, recompute=True)
        sizes = f"{settings.batch_size} | {settings.batch_size // settings.accumulation} | {settings.precision}"
        needs = f"{memory(one, settings) / 1e9:.1f} GB | {memory(cost(stage, preset.models[stage], again), again) / 1e9:.1f} GB"
        lines.append(f"| {stage} | {one.parameters / 1e6:.0f} M | {sizes} | {needs} | {one.gpu_days:.2f} |")
    return "\n".join(lines)


def many_gpus_as_markdown(preset: Preset, gpus: tuple[int, ...] = (8, 64, 256)) -> str:
    """Days for all steps, the share of them that is spent computing, and memory a GPU, on so many A100s, with `recompute` and, but for CLIP, `sharded`."""
    lines = ["| stage | between machines | " + " | ".join(f"{n} GPUs" for n in gpus) + " |", "|---|---|" + "---|" * len(gpus)]
    for stage, config in preset.models.items():
        if stage == "checker":
            continue
        settings = replace(preset.training[stage], recompute=True, sharded=stage != "clip")
        one = cost(stage, config, settings)
        for name, network in NETWORKS.items():
            cells = []
            for n in gpus:
                days = step_seconds(one, settings, n, network) * settings.steps / 86_400
                cells.append(f"{days:,.1f} days, {one.gpu_days / n / days:.0%}, {memory(one, settings, n) / 1e9:.0f} GB")
            lines.append(f"| {stage} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_text(preset: Preset) -> str:
    """The budget as a table for a terminal."""
    heads = ("parameters", "paper", "forward", "a picture", "weights", "optimiser", "activations", "training", "A100-days")
    widths = (11, 6, 15, 14, 9, 10, 12, 15, 10)
    rows = [("stage", *heads)]
    for stage, one in budget(preset).items():
        rows.append(
            (
                stage,
                f"{one.parameters / 1e6:,.1f} M",
                STATED.get(stage, "–"),
                f"{one.forward / 1e9:,.1f} GFLOP",
                f"{one.sampling / 1e12:,.2f} TFLOP",
                f"{one.parameters * WEIGHT / 1e9:,.1f} GB",
                f"{one.parameters * (BYTES - WEIGHT) / 1e9:,.1f} GB",
                f"{one.activations / 1e6:,.1f} MB",
                f"{one.training / 1e18:,.1f} EFLOP",
                f"{one.gpu_days:,.1f}",
            )
        )
    lines = [f"{row[0]:<11}" + "".join(f"{value:>{width + 1}}" for value, width in zip(row[1:], widths)) for row in rows]
    lines.append(f"optimiser: gradients, two moments, moving average, so {BYTES} bytes a parameter with its weight; activations: of one example, float32")
    lines.append(f"a picture: all candidates, without guidance; A100-days: at {UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s; paper: parameters in Tab. 3")
    lines.append("Tab. 3 rounds: its own widths and depths give its priors 1.2B and 0.8B, the latter without a text transformer, for which CLIP's stands here")
    return "\n".join(lines)
