"""How fast: sampling cold and warm, a training step of every stage, and the share of this machine's own matmul ceiling that each step reaches.

    python benchmarks/speed.py [--preset cpu] [--run runs/bench] [--weights data/weights] [--json FILE]

Run it on an idle machine. Step times are medians. The ceiling is the fastest of several square products in the precision that training uses,
measured in the same run; operations are counted by torch's FlopCounterMode, forward and backward. Stages that need CLIP take that of --weights, or, of
another preset, an untrained one, which is as fast (but the autoregressive prior may then keep another number of components).
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from minunclip.cli import WEIGHTS, pick_device
from minunclip.config import PRESETS, STAGES
from minunclip.loading import config_to_json
from minunclip.models.clip import CLIP
from minunclip.pipeline import UnCLIP
from minunclip.runs import Run
from minunclip.stages import prepare
from minunclip.training import autocast, make_optimizers, save_model, suited, update_ema

CAPTION = "a red circle above a blue square"


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of one call, after two to warm up."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return statistics.median([once() for _ in range(repeats + 2)][2:])


def ceiling(device: torch.device, precision: str) -> float:
    """Operations a second of the fastest square matmul."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    best = 0.0
    for side in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
        best = max(best, 2 * side**3 / seconds(lambda a=a, b=b: a @ b, device, 10))  # type: ignore[misc]
    return best


def training_step(stage: str, run: Run, repeats: int) -> dict[str, float]:
    """One whole step: batch, forward, backward, clipping, optimiser, moving average."""
    settings, model, batch, loss, _ = prepare(stage, run)
    settings = suited(settings, run.device)
    average, optimizers = copy.deepcopy(model).requires_grad_(False), make_optimizers(model, settings)
    model.train()
    step = iter(range(10**9))

    def one() -> None:
        data = {key: value.to(run.device) for key, value in batch(next(step)).items()}
        for part in range(settings.accumulation):
            with autocast(run.device, settings.precision):
                value = loss(model, {key: tensor.chunk(settings.accumulation)[part] for key, tensor in data.items()})
            value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        update_ema(average, model, 10**6, settings.ema_decay)

    with FlopCounterMode(display=False) as counter:
        one()
    took = seconds(one, run.device, repeats)
    share = counter.get_total_flops() / took / ceiling(run.device, settings.precision)
    return {"seconds": took, "images_per_second": settings.batch_size / took, "share_of_ceiling": share, "steps": settings.steps}


def table(figures: dict) -> str:
    """The figures as the tables of README.md."""
    lines = ["| drawing one picture | seconds |", "|---|---|", *(f"| {name} | {value:.2f} |" for name, value in figures["sampling"].items())]
    lines += ["", "| a training step of | seconds | images a second | share of the matmul ceiling | steps | minutes |", "|---|---|---|---|---|---|"]
    for stage, found in figures["training"].items():
        cells = f"{found['seconds']:.3f} | {found['images_per_second']:,.0f} | {found['share_of_ceiling']:.0%} | {found['steps']:,}"
        lines.append(f"| {stage} | {cells} | {found['steps'] * found['seconds'] / 60:.0f} |")
    return "\n".join([*lines, f"| all | | | | | {figures['training minutes']:.0f} |"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu", choices=[name for name in PRESETS if name != "paper"])
    parser.add_argument("--run", default="runs/bench")
    parser.add_argument("--weights", default=str(WEIGHTS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json")
    given = parser.parse_args()
    device = pick_device("auto")
    figures: dict = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}"}
    print(figures["machine"])

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "minunclip.cli", "sample", CAPTION, "--weights", given.weights, "--out", f"{folder}/picture.png"]
        cold = seconds(lambda: subprocess.run(command, check=True, capture_output=True), torch.device("cpu"), min(3, given.repeats))
    model = UnCLIP.from_pretrained(given.weights, device)
    figures["sampling"] = {"cold, import to file": cold}
    for size in model.sizes:
        figures["sampling"][f"warm, {size}"] = seconds(lambda size=size: model.generate([CAPTION], size=size), device, 5)  # type: ignore[misc]
    for name, value in figures["sampling"].items():
        print(f"{name}: {value:.2f} s")

    figures["training"] = {}
    preset, clip = PRESETS[given.preset], model.models["clip"]
    if not (Path(given.run) / "clip").exists():
        save_model(Path(given.run) / "clip", clip if clip.config == preset.clip else CLIP(preset.clip), config_to_json(preset.clip))
    for stage in STAGES:
        run = Run(preset, Path(given.run), device)
        found = figures["training"][stage] = training_step(stage, run, given.repeats)
        print(
            f"{stage}: {found['seconds']:.3f} s a step, {found['images_per_second']:,.0f} images/s, {found['share_of_ceiling']:.0%} of the matmul ceiling; "
            f"{found['steps']:,.0f} steps take {found['steps'] * found['seconds'] / 60:.0f} min",
            flush=True,
        )
    figures["training minutes"] = sum(found["steps"] * found["seconds"] for found in figures["training"].values()) / 60
    print(f"the whole chain: {figures['training minutes']:.0f} min of training steps")
    print(table(figures))
    if given.json:
        Path(given.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
