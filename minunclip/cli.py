"""The command line: `minunclip train | sample | pack | info | preview`. Bad input ends with one line on stderr and exit code 2."""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minunclip.config import PRESETS, STAGES
from minunclip.data.captions import LEVELS, caption, parse
from minunclip.data.render import render
from minunclip.data.scenes import sample_scenes
from minunclip.loading import MODELS
from minunclip.pipeline import UnCLIP
from minunclip.pipeline import pack as pack_run
from minunclip.stages import Run, preset_named, tile
from minunclip.stages import train as train_stage
from minunclip.training import TrainingError

WEIGHTS = Path(__file__).resolve().parents[1] / "data" / "weights"
Device = Literal["auto", "cuda", "mps", "cpu"]


def pick_device(name: Device) -> torch.device:
    """`auto` is the first of cuda, mps, cpu that is there."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def train(
    stage: Literal["clip", "prior", "ar-prior", "decoder", "upsampler1", "upsampler2", "all"],
    preset: Literal["tiny", "cpu", "gpu"] = "cpu",
    out: str = "runs/cpu",
    seed: int = 0,
    device: Device = "auto",
    resume: Literal["auto", "never"] = "auto",
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
) -> None:
    """Train one stage, or all in order; settings that are not given are the preset's. A run that was cut short goes on."""
    run = Run(preset_named(preset), Path(out), pick_device(device), seed)
    given = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "precision": precision}
    for name in STAGES if stage == "all" else (stage,):
        settings = replace(run.preset.training[name], **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
        train_stage(name, run, settings=settings, resume=resume == "auto")


def sample(
    captions: list[str],
    seed: int = 0,
    out: str = "picture.png",
    count: int = 1,
    size: int | None = None,
    prior: Literal["diffusion", "autoregressive"] = "diffusion",
    guidance: float = 2.0,
    weights: str = str(WEIGHTS),
    device: Device = "auto",
) -> None:
    """Draw captions. One picture goes to `out`; several go to numbered files beside a grid in `out`. Seeds count up from `seed`."""
    path = Path(out)
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no folder: make it first, or choose another --out")
    if count < 1 or not captions:
        raise ValueError("nothing to draw: give at least one caption, and a --count of 1 or more")
    model = UnCLIP.from_pretrained(weights, pick_device(device))
    for text in captions:
        for word in parse(text).unknown:
            print(f"warning: the models have never seen the word {word!r}", file=sys.stderr)
        if model.tokenizer.length(text) > model.models["clip"].config.context_length:
            print(f"warning: caption cut to {model.models['clip'].config.context_length} tokens: {text[:60]!r}", file=sys.stderr)
    texts = [text for text in captions for _ in range(count)]
    seeds = [seed + i for _ in captions for i in range(count)]
    pictures = list(model.generate(texts, prior, seeds, size, guidance).pictures.values())[-1]
    digest = hashlib.sha256((Path(weights) / "decoder" / "model.safetensors").read_bytes()).hexdigest()[:12]
    for i, (text, number, picture) in enumerate(zip(texts, seeds, pictures)):
        facts = PngInfo()
        for key, value in {"prompt": text, "seed": str(number), "prior": prior, "guidance": str(guidance), "weights": digest}.items():
            facts.add_itxt(key, value)
        name = path if len(texts) == 1 else path.with_name(f"{path.stem}-{i}{path.suffix}")
        Image.fromarray(picture).save(name, pnginfo=facts)
        print(name)
    if len(texts) > 1:
        Image.fromarray(tile(pictures, min(8, len(pictures)))).save(path)
        print(path)


def pack(run: str, weights: str) -> None:
    """Turn the folder of a training run into a folder of weights that ships."""
    pack_run(Path(run), Path(weights))


def info(weights: str = str(WEIGHTS)) -> None:
    """Print the device, the parameters of every preset, and the weights with their hashes."""
    print(f"device: {pick_device('auto')}")
    for name, preset in PRESETS.items():
        configs = dict(zip(STAGES, (preset.clip, preset.prior, preset.ar_prior, preset.decoder, preset.upsampler1, preset.upsampler2)))
        with torch.device("meta"):
            counts = {stage: sum(p.numel() for p in MODELS[stage][0](config).parameters()) for stage, config in configs.items()}
        print(f"{name}: " + ", ".join(f"{stage} {number / 1e6:,.2f} M" for stage, number in counts.items()))
    for stage in STAGES:
        path = Path(weights) / stage / "model.safetensors"
        print(f"{path}: {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}" if path.exists() else f"{path}: not there")


def preview(out: str = "preview.png", seed: int = 0, count: int = 32, held_out: bool = False) -> None:
    """Draw scenes of the captioned world, and print one caption each."""
    import numpy as np

    scenes, rng = sample_scenes(count, seed, held_out), np.random.default_rng(seed)
    Image.fromarray(tile(render(scenes, 128))).save(out)
    for i, scene in enumerate(scenes):
        print(caption(scene, LEVELS[i % len(LEVELS)], rng))


COMMANDS: dict[str, Callable[..., None]] = {"train": train, "sample": sample, "pack": pack, "info": info, "preview": preview}
POSITIONAL = {"train": ("stage",), "sample": ("captions",), "pack": ("run", "weights")}


def make_parser() -> ArgumentParser:
    """One sub-command a function: what stands in POSITIONAL is given by place, all else by --name, or in a YAML file by --config."""
    parser = ArgumentParser(prog="minunclip", description="unCLIP, trained from scratch.")
    commands = parser.add_subcommands(required=True)
    for name, function in COMMANDS.items():
        command = ArgumentParser(description=(function.__doc__ or "").splitlines()[0])
        command.add_argument("--config", action="config", help="a YAML file with options")
        places = POSITIONAL.get(name, ())
        for place in places:
            kind = function.__annotations__[place]
            if kind == list[str]:
                command.add_argument(place, nargs="+", type=str)
            else:
                command.add_argument(place, type=kind)
        command.add_function_arguments(function, skip=set(places))
        commands.add_subcommand(name, command)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    given = make_parser().parse_args(arguments)
    options = given[given.subcommand].as_dict()
    options.pop("config", None)
    try:
        COMMANDS[given.subcommand](**options)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, TrainingError, OSError) as error:
        print(f"minunclip: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
