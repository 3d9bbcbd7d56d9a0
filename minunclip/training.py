"""One training loop for every stage: it knows no model, only a batch, a loss and what to save.

AdamW or Muon with linear warm-up and cosine decay, gradient clipping and accumulation, an exponential moving average of the weights, bf16 or fp16
autocast, a JSONL log, a loss curve, samples from fixed noise, TensorBoard if asked for, and checkpoints from which a run goes on bit for bit as if it had never
stopped (on the CPU): every step seeds torch with its own number, and every batch is a function of the step.
"""

import copy
import json
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed
from tqdm import tqdm

from minunclip import distributed
from minunclip.config import LEARNS_FROM, TrainingConfig
from minunclip.eight_bits import to_rows
from minunclip.muon import Muon, bf16_is_fast
from minunclip.tracking import open_board, show_line

Batch = dict[str, Tensor]
LOG_EVERY = 10
FP16_SKIPS = 16  # steps in a row that fp16 may skip: the scale of the loss, 2 ** 16 at first, is halved with each
PART = 2_654_435_761  # 2^32 over the golden ratio: multiples lie far apart in the 32 bits that a CPU's generator takes of a seed
MEANS = ("accumulation", "recompute", "compile", "sharded")  # settings that change how a run comes about, not what comes of it


class TrainingError(RuntimeError):
    """A run that had to stop; the message is one line for the person who started it."""


class Diverged(TrainingError):
    """A loss or a gradient is no number any more."""


def learning_rate_at(step: int, settings: TrainingConfig) -> float:
    """Linear warm-up, then half a cosine down to `final_learning_rate` of the peak. Steps count from 0."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    floor = settings.final_learning_rate
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def make_optimizers(model: nn.Module, settings: TrainingConfig) -> list[torch.optim.Optimizer]:
    """AdamW; only matrices and kernels decay, never biases, norms or single vectors. With "muon" it shares them out.

    Muon takes the matrices of linear layers and the kernels of convolutions, but for a U-Net's first and last. Embeddings and positions are
    rows of a table and no maps: they stay with AdamW.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    maps = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    ends = ("conv_in.weight", "conv_out.weight")
    hidden = [p for name, p in trained.items() if settings.optimizer == "muon" and name in maps and not name.endswith(ends)]
    taken = {id(parameter) for parameter in hidden}
    matrices = [p for p in trained.values() if p.ndim >= 2 and id(p) not in taken]
    vectors = [p for p in trained.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (settings.beta1, settings.beta2)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.epsilon, fused=True)]
    if hidden:
        optimizers.append(Muon(hidden, settings.learning_rate, settings.weight_decay))
    return optimizers


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, over parameters; buffers are copied. Early on the decay is smaller, to forget the start."""
    decay = min(decay, (1 + step) / (10 + step))
    for kept, current in zip(average.buffers(), model.buffers()):
        kept.copy_(current)
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def recompute(model: nn.Module) -> None:
    """Every layer keeps only its input for the backward pass, which runs the layer again (Chen et al. 2016), with the same random numbers."""
    for layer in distributed.layers(model):
        layer.forward = partial(checkpointed, layer.forward, use_reentrant=False)  # type: ignore[method-assign]


def compile_stacks(model: nn.Module, backend: str = "inductor") -> None:
    """torch.compile on every transformer and U-Net: whatever holds a stack of layers. Dropout then draws other numbers."""
    for module in model.modules():
        if any(isinstance(child, nn.ModuleList) for child in module.children()):
            module.compile(backend=backend)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary name, then renames: the old file stays whole if anything goes wrong in between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # what Python, torch and safetensors make of a full disk
        temporary.unlink(missing_ok=True)
        raise TrainingError(
            f"cannot write {path} ({str(error).splitlines()[0]}): what stood there is intact; free some space, or choose another folder"
        ) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_checkpoint(path: Path, **how: Any) -> dict[str, Any]:
    """What `fit` has kept of a run; `how` goes to `torch.load`. TrainingError where the file is damaged, or another's."""
    try:
        state = torch.load(path, weights_only=True, **how)
    except PermissionError:
        raise
    except (RuntimeError, EOFError, OSError, UnpicklingError):
        state = None
    if not isinstance(state, dict) or "identity" not in state:
        raise TrainingError(f"{path} is damaged: train this stage anew, with --resume never")
    return state


def save_model(folder: Path, model: nn.Module, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """A model as other tools know it: `model.safetensors` and `config.json`. In int8 its parameters of two dimensions or more are (see eight_bits.py)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: (v.to(dtype) if v.is_floating_point() and dtype != torch.int8 else v).contiguous() for k, v in model.state_dict().items()}
    if dtype == torch.int8:
        tensors = to_rows(tensors, {name for name, parameter in model.named_parameters() if parameter.ndim >= 2})
    write_atomically(folder / "model.safetensors", lambda path: save_file(tensors, path))
    write_atomically(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=1)))


def autocast(device: torch.device, precision: str) -> Any:
    """The context in which forward passes run."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def suited(settings: TrainingConfig, device: torch.device) -> TrainingConfig:
    """bf16 only where the device computes in it: elsewhere float32 is faster."""
    return replace(settings, precision="fp32") if settings.precision == "bf16" and not bf16_is_fast(device) else settings


def fit(
    model: nn.Module,
    batch: Callable[[int], Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    settings: TrainingConfig,
    folder: Path,
    *,
    name: str,
    model_config: dict[str, Any],
    seed: int = 0,
    source: str | None = None,
    resume: bool = True,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    sample: Callable[[nn.Module], np.ndarray] | None = None,
    stop_after: int | None = None,
    track: bool = False,
) -> nn.Module:
    """Trains `model` in place and returns its moving average, which is what is saved in `folder` and used from then on.

    `batch(step)` gives tensors with a first dimension of `settings.batch_size`; `loss(model, batch)` a scalar. `validate` and `sample` see the moving
    average; `sample` gives a picture, uint8 (H, W, 3). `source` is the hash of the frozen weights that are learned from. `folder` holds the log,
    pictures and checkpoint; with `resume` a run that was cut short there goes on. `stop_after` ends the run at that step, with a checkpoint; a run that
    is past it stays as it is. With `track` TensorBoard finds it all in `folder` too. Raises TrainingError on a loss that is not finite.
    Under torchrun every process calls it alike, and the first one alone writes (see `minunclip.distributed`).
    """
    device = next(model.parameters()).device
    settings = suited(settings, device)
    writes, parts = distributed.rank() == 0, settings.accumulation * distributed.ranks()
    if settings.batch_size % parts:
        raise TrainingError(f"{name}: a batch of {settings.batch_size} does not fall into {parts} equal parts: change batch_size or accumulation")
    sharded = settings.sharded and distributed.ranks() > 1
    if sharded and settings.precision == "fp16":
        raise TrainingError(f"{name}: fp16 scales the loss by gradients that no process sees whole: shard in bf16 or fp32")
    folder.mkdir(parents=True, exist_ok=True)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
    identity = _identity({"training": asdict(settings), "model": model_config, "seed": seed, "source": source})
    checkpoint, log = folder / "training.pt", folder / "log.jsonl"
    end = settings.steps if stop_after is None else min(stop_after, settings.steps)
    first, seconds, state = 0, 0.0, None
    if resume and checkpoint.exists():
        state = read_checkpoint(checkpoint, map_location="cpu" if sharded else device, mmap=sharded)
        earlier = {"source": source, **json.loads(state["identity"])}
        if _identity({**earlier, "source": source}) != identity:
            raise TrainingError(f"{folder} holds a {name} run with other settings: give another --out, or --resume never to start anew")
        if earlier["source"] != source:
            raise TrainingError(f"{folder} has learned from a {LEARNS_FROM.get(name)} that was trained further since: use --resume never to start anew")
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        scaler.load_state_dict(state["scaler"])
        first, seconds = state["step"], state["seconds"]
    shown = average  # what is looked at and saved
    if sharded:
        shown = copy.deepcopy(average).to(device if writes else "cpu")
        distributed.shard(model)
        distributed.shard(average)
    if settings.recompute:
        recompute(model)
    if settings.compile:
        compile_stacks(model)
    optimizers = make_optimizers(model, settings)
    for optimizer, kept in zip(optimizers, state["optimizers"] if state is not None else ()):
        owners = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        shares = {i: {key: distributed.share(value, owners[i]) for key, value in entry.items()} for i, entry in kept["state"].items()}
        optimizer.load_state_dict({**kept, "state": shares})
    del state
    if writes:
        _cut_log(log, first)
    boards = [open_board(folder, first)] if track and writes else []

    def save(step: int) -> None:
        state = {"step": step, "seconds": seconds, "identity": identity, "model": model.state_dict(), "average": average.state_dict()}
        state |= {"optimizers": [optimizer.state_dict() for optimizer in optimizers], "scaler": scaler.state_dict()}
        state = distributed.whole(state)
        if writes:
            write_atomically(checkpoint, lambda path: torch.save(state, path))
            save_model(folder, shown, model_config)

    stopping: list[int] = []
    previous = {s: signal.signal(s, lambda number, frame: stopping.append(number)) for s in _signals()}
    bar = tqdm(total=settings.steps, initial=first, desc=name, unit="step", dynamic_ncols=True, mininterval=2, disable=not writes)
    pending: list[Tensor] = []
    step, started, waited, skipped = first, time.perf_counter(), 0.0, 0
    try:
        while step < end:
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = learning_rate_at(step, settings)
            before = time.perf_counter()
            data = {key: value.to(device, non_blocking=True) for key, value in batch(step).items()}
            waited += time.perf_counter() - before
            model.train()
            total = torch.zeros((), device=device)
            for k in range(distributed.rank() * settings.accumulation, (distributed.rank() + 1) * settings.accumulation):
                torch.manual_seed((seed * 1_000_003 + step + k * PART) % 2**63)
                with autocast(device, settings.precision):
                    part = loss(model, {key: value.chunk(parts)[k] for key, value in data.items()}) / parts
                scaler.scale(part).backward()
                total += part.detach()
            distributed.add_gradients(model)
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = distributed.clip_gradients(model, settings.clip_norm)
            # in fp16 a scaled gradient may overflow: no optimiser steps then, and the scale is halved (to know, the host has to wait for the device)
            skipped = skipped + 1 if settings.precision == "fp16" and not math.isfinite(norm) else 0
            for optimizer in optimizers:
                if not skipped:
                    scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            scaler.update()
            update_ema(average, model, step, settings.ema_decay)
            pending.append(total)
            step += 1
            stop = distributed.anywhere(bool(stopping), device)
            due = step % settings.checkpoint_every == 0 or step == end or stop
            looked_at = validate is not None and (step % settings.validate_every == 0 or step == settings.steps)
            if sharded and (due or step % settings.validate_every == 0 or step % settings.sample_every == 0):
                distributed.put_together(average, shown)
            if step % LOG_EVERY == 0 or due or looked_at:  # the only places where the host waits for the device
                losses = distributed.total(torch.stack(pending)).tolist()
                pending.clear()
                _require_finite(losses, step, name)
                if not math.isfinite(norm) and (settings.precision != "fp16" or skipped > FP16_SKIPS):
                    raise Diverged(f"{name}: the gradient is not finite at step {step}: lower learning_rate or use fp32; the last checkpoint is intact")
                now = time.perf_counter()
                seconds += now - started
                speed = len(losses) * settings.batch_size / (now - started)
                line = {"step": step, "loss": sum(losses) / len(losses), "learning_rate": learning_rate_at(step - 1, settings)}
                line |= {"gradient_norm": float(norm), "images_per_second": round(speed, 1), "seconds": round(seconds, 2)}
                line |= {"data_wait": round(waited / (now - started), 4)}
                if writes and looked_at and validate is not None:
                    line |= validate(shown)
                if writes:
                    _append(log, json.dumps(line) + "\n")
                for board in boards:
                    show_line(board, line)
                bar.set_postfix_str(f"loss {line['loss']:.4f}, {speed:.0f} images/s")
                started, waited = time.perf_counter(), 0.0
            bar.update()
            pause = time.perf_counter()
            if due:
                save(step)
            if writes and (step % settings.sample_every == 0 or step == settings.steps):
                from minunclip.plots import loss_figure, save_figure

                figure = loss_figure(read_log(log), name)
                save_figure(folder / "loss.png", figure, {"stage": name, "step": step, "seed": seed}, dpi=110)
                for board in boards:
                    board.add_figure("loss curve", figure, step)
                if sample is not None:
                    from minunclip.safety import save_picture

                    picture = sample(shown)
                    save_picture(folder / f"samples-{step:06d}.png", picture, {"stage": name, "step": step, "seed": seed})
                    for board in boards:
                        board.add_image("samples", picture, step, dataformats="HWC")
            started += time.perf_counter() - pause
            if due:
                distributed.wait_for_all()  # nobody leaves, or goes on to the next stage, before the files are written
            if stop:
                raise KeyboardInterrupt
    except torch.OutOfMemoryError:
        raise TrainingError(f"{name}: out of memory at step {step}: halve batch_size, or double accumulation") from None
    except RuntimeError as error:
        if distributed.ranks() == 1 or isinstance(error, TrainingError) or "peer" not in str(error):
            raise
        raise TrainingError(f"{name}: another process was lost at step {step}; the last checkpoint is intact, the same command goes on from it") from None
    finally:
        bar.close()
        for board in boards:
            board.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if writes and step == first == settings.steps:  # a run that was killed between its last checkpoint and its model has an older model there
        save_model(folder, shown, model_config)
    if distributed.anywhere(bool(stopping), device):  # asked while the last step was looked at or saved: there may be a next stage
        raise KeyboardInterrupt
    return shown


def _signals() -> tuple[signal.Signals, ...]:
    """Ctrl-C and a polite kill end a run after the step in hand. Only the main thread may listen."""
    import threading

    return (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()


def _identity(facts: dict[str, Any]) -> str:
    """What two runs must share for one to go on from the other, as a line of JSON."""
    return json.dumps({**facts, "training": {key: value for key, value in facts["training"].items() if key not in MEANS}}, sort_keys=True)


def _require_finite(losses: list[float], step: int, name: str) -> None:
    for i, value in enumerate(losses):
        if not math.isfinite(value):
            raise Diverged(f"{name}: the loss is {value} at step {step - len(losses) + i + 1}: lower learning_rate or use fp32; the last checkpoint is intact")


def _append(log: Path, line: str) -> None:
    try:
        with open(log, "a") as file:
            file.write(line)
    except OSError as error:
        raise TrainingError(f"cannot write {log} ({error}): free some space; the same command goes on from the last checkpoint") from None


def _cut_log(log: Path, step: int) -> None:
    """Drops what a lost run had logged past the checkpoint from which this one goes on."""
    lines = [line for line in log.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step] if log.exists() else []
    write_atomically(log, lambda path: path.write_text("".join(line + "\n" for line in lines)))


def read_log(log: Path) -> list[dict[str, float]]:
    """The lines of a JSONL log, but for one that a full disk has cut short."""
    return [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
