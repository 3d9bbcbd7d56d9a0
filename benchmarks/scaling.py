"""How a training step grows with the processes that share it, on the cores of this machine, and how fast gloo's all-reduce is.

    python benchmarks/scaling.py [--preset cpu] [--stage decoder] [--batch 16] [--json FILE]

Run it on an idle machine. Each process has one thread; the batch of a step is the same for all of them together. A step is forward, backward, sum of the
gradients, clipping, optimiser and moving average, on random numbers; times are medians. With `sharded` each process keeps its share of the model.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed as processes

from minunclip import distributed
from minunclip.budget import BYTES, WEIGHT, sample_inputs
from minunclip.config import PRESETS
from minunclip.loading import MODELS
from minunclip.training import make_optimizers, update_ema

STEPS = 8


def measure(preset: str, stage: str, batch: int, sharded: bool) -> dict[str, float]:
    """One process's part of it: medians in seconds of a step, of its forward and backward pass, and of an all-reduce of as many bytes as the gradients have."""
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    config, settings = PRESETS[preset].models[stage], replace(PRESETS[preset].training[stage], optimizer="adamw")
    torch.manual_seed(0)
    model = MODELS[stage][0](config)
    average = copy.deepcopy(model).requires_grad_(False)
    gradients = torch.zeros(sum(parameter.numel() for parameter in model.parameters()))
    if sharded:
        distributed.shard(model)
        distributed.shard(average)
    optimizers = make_optimizers(model, settings)
    inputs = sample_inputs(stage, config, batch // distributed.ranks())
    steps, computing, sums = [], [], []
    for step in range(STEPS + 2):
        start = time.perf_counter()
        model(*inputs).square().mean().backward()
        computing.append(time.perf_counter() - start)  # of a sharded model with its gathering
        distributed.add_gradients(model)
        distributed.clip_gradients(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        update_ema(average, model, step, 0.99)
        distributed.wait_for_all()
        steps.append(time.perf_counter() - start)
        start = time.perf_counter()
        if distributed.ranks() > 1:
            processes.all_reduce(gradients)
        sums.append(time.perf_counter() - start)
    figures = {"seconds": statistics.median(steps[2:]), "forward_and_backward": statistics.median(computing[2:])}
    figures["gradient_bytes"] = WEIGHT * gradients.numel()
    if distributed.ranks() > 1:
        figures["all_reduce"] = statistics.median(sums[2:])
    figures["state_bytes"] = BYTES * sum(distributed.local(parameter).numel() for parameter in model.parameters())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--stage", default="decoder")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=["whole", "sharded"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        figures = measure(given.preset, given.stage, given.batch, given.worker == "sharded")
        if distributed.rank() == 0:
            print(json.dumps(figures))
        return
    facts: dict[str, object] = {"load_before": round(os.getloadavg()[0], 1)} if hasattr(os, "getloadavg") else {}
    facts |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}", "preset": given.preset, "stage": given.stage}
    found: dict[str, dict[str, float]] = {}
    for name, count, kind in (("1 process", 1, "whole"), ("2 processes", 2, "whole"), ("2 processes, sharded", 2, "sharded")):
        start = [sys.executable] if count == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [*start, __file__, "--preset", given.preset, "--stage", given.stage, "--batch", str(given.batch), "--worker", kind]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, found[name], flush=True)
    if given.json:
        given.json.write_text(json.dumps({**facts, "batch": given.batch, "steps": STEPS, "figures": found}, indent=1))


if __name__ == "__main__":
    main()
