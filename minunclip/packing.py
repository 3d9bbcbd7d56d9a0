"""From the folder of a training run to a folder of weights that ships: few bits a weight, and a card a model that says where it comes from."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from minunclip.config import BASELINES, LEARNS_FROM, PRESETS, STAGES
from minunclip.data.tokenizer import Tokenizer
from minunclip.loading import config_to_json, file_hash, load_model, read_tensors
from minunclip.pipeline import OPTIONAL, require_fit
from minunclip.training import read_checkpoint, read_log, save_model, write_atomically

EIGHT_BITS = ("prior", "ar-prior", "decoder", *BASELINES)  # the large ones, which draw as well so; CLIP measures, and the upsamplers are small

WHAT = {
    "clip": "CLIP: an image and a text encoder that agree. It judges pictures and captions of this world alone.",
    "prior": "The diffusion prior: from a caption to a CLIP image embedding.",
    "ar-prior": "The autoregressive prior: from a caption to a CLIP image embedding, one principal component after another.",
    "decoder": "The decoder: from a CLIP image embedding and a caption to a small picture.",
    "upsampler1": "The first upsampler, four times the side.",
    "upsampler2": "The second upsampler, four times the side.",
    "glide": "GLIDE, which unCLIP is compared with: the decoder's network, from a caption alone to a small picture.",
    "dalle-vae": "The discrete VAE of DALL-E, which unCLIP is compared with: a small picture as a grid of codes, and back.",
    "dalle": "The transformer of DALL-E, which unCLIP is compared with: from a caption to a picture's codes.",
    "checker": "The checker: reads a picture back into a scene. No part of unCLIP; it never saw a generated picture.",
}
LIMITS = (
    "It knows the captioned world and nothing else: 8 shapes, 10 colours, 4 textures, 6 backgrounds, up to three things. Other words are noise to "
    "it. `minunclip evaluate` says how often it is right, on combinations that it has never seen; the figures stand in README.md."
)


def _only_tokenizer(run: Path) -> Tokenizer:
    paths = sorted((run / "data").glob("world-*/tokenizer.json"))
    if not paths:
        raise ValueError(f"{run / 'data'} has no tokenizer: is {run} the folder of a training run?")
    if len({path.read_bytes() for path in paths}) > 1:
        raise ValueError(f"{run / 'data'} has worlds with different tokenizers: keep only the one that this run was trained on")
    return Tokenizer.load(paths[0])


def _identity(run: Path, stage: str) -> dict[str, Any]:
    """What a stage was trained with (see `training.fit`); empty where it was not trained in this run."""
    checkpoint = run / stage / "training.pt"
    return json.loads(read_checkpoint(checkpoint, map_location="cpu", mmap=True)["identity"]) if checkpoint.exists() else {}


def _is_stale(run: Path, stage: str) -> bool:
    """Whether a stage has learned from other weights than those that its run now has of the stage before it."""
    source, identity = LEARNS_FROM.get(stage), _identity(run, stage)
    if source is None or not (run / source / "model.safetensors").exists():
        return source is not None
    now = file_hash(run / source / "model.safetensors")
    return identity.get("source", now) != now if identity else (run / source / "training.pt").exists()


def _card(run: Path, stage: str, preset: str) -> str:
    """What a model was trained with and where it ended, for people."""
    provenance = json.loads((run / stage / "provenance.json").read_text()) if (run / stage / "provenance.json").exists() else {}
    facts: dict[str, object] = {"preset": preset, **provenance}
    if identity := _identity(run, stage):
        training = identity["training"]
        facts |= {"seed": identity["seed"]}
        command = f"minunclip train {stage} --preset {facts['preset']} --seed {identity['seed']}"
        command += "".join(f" --{name} {training[name]}" for name in ("steps", "batch_size", "learning_rate", "precision"))
        command += "".join(f" --{name} {facts[name]}" for name in ("data", "init", "clip") if name in facts)
        facts |= {"command": f"`{command}`"} if facts["preset"] != "own" else {}
    for line in read_log(run / stage / "log.jsonl")[-1:]:
        facts |= {name.replace("_", " "): f"{value:.6g}" for name, value in line.items()}
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    curve = "\n![loss against step, training and validation, on a logarithmic axis](loss.png)\n" if (run / stage / "loss.png").exists() else ""
    data = "Data: scenes of the captioned world, drawn by `minunclip/data`; no picture from elsewhere. Licence: MIT, as the code.\n\n" + LIMITS
    if "data" in facts:
        data = f"Data: the pictures of {facts['data']}, whose licence holds for this model too. Figures and limits: not measured."
    return f"# {stage}\n\n{WHAT[stage]}\n\n{data}\n\n| | |\n|---|---|\n{rows}{curve}"


@contextmanager
def _in_place_of(folder: Path) -> Iterator[Path]:
    """A copy of a folder, or a new one, beside it, which takes its place if nothing fails: two trainings are never mixed."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        new, old = Path(beside) / "new", Path(beside) / "old"
        if folder.exists():
            shutil.copytree(folder, new, symlinks=True)
        else:
            new.mkdir()
        yield new
        try:
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
        finally:
            if old.exists() and not folder.exists():
                os.replace(old, folder)


def pack(run: Path, weights: Path) -> None:
    """A training run's folder to one that ships: weights in float16 (those of EIGHT_BITS: in eight bits), the tokenizer, and a card a
    stage with its figures and its loss curve.

    Everything is read and checked before the first file is written, and on any error `weights` stays as it was. Stages of OPTIONAL that the run
    lacks are left out, and so are those that have learned from an earlier CLIP or VAE than the run's; those of them that `weights` had before go, if
    they stand on another CLIP, VAE or tokenizer.
    """
    stages = [stage for stage in STAGES + BASELINES if stage not in OPTIONAL or (run / stage / "model.safetensors").exists()]
    if run.resolve() == weights.resolve():
        raise ValueError(f"{run} is the run itself, whose models would be rounded: pack it into another folder")
    models: dict[str, Any] = {stage: load_model(stage, run / stage) for stage in stages}
    trained = {stage for stage in stages if (run / stage / "training.pt").exists()}
    for stage in [stage for stage in stages if _is_stale(run, stage)]:
        reason = f"{run / stage} has not learned from the {LEARNS_FROM[stage]} that is now in {run}"
        remedy = f"`minunclip train {stage} --resume never` makes it follow"
        if stage not in OPTIONAL:
            raise ValueError(f"{reason}: {remedy}")
        stages.remove(stage)
        del models[stage]
        print(f"{reason}, and is left out: {remedy}")
    tokenizer = _only_tokenizer(run)
    require_fit(run, models, tokenizer)
    preset = next((name for name, preset in PRESETS.items() if preset.clip == models["clip"].config), "own")
    cards = {stage: _card(run, stage, preset) for stage in stages if (run / stage / "log.jsonl").exists()}
    with _in_place_of(weights) as new:
        other_words = (new / "tokenizer.json").exists() and Tokenizer.load(new / "tokenizer.json").merges != tokenizer.merges
        for stage in set(OPTIONAL) - set(stages):  # packed before
            if (new / stage).exists() and (other_words or LEARNS_FROM.get(stage) in trained):
                shutil.rmtree(new / stage)
        for stage, model in models.items():
            if stage not in trained and torch.float32 not in {tensor.dtype for tensor in read_tensors(run / stage / "model.safetensors").values()}:
                (new / stage).mkdir(parents=True, exist_ok=True)  # packed before, and not touched since
                for name in ("model.safetensors", "config.json"):
                    write_atomically(new / stage / name, partial(shutil.copyfile, run / stage / name))
            else:
                save_model(new / stage, model, config_to_json(model.config), torch.int8 if stage in EIGHT_BITS else torch.float16)
        tokenizer.save(new / "tokenizer.json")
        for stage in models:  # what described the model that stood there goes with it
            for name in ("card.md", "loss.png"):
                (new / stage / name).unlink(missing_ok=True)
                if (run / stage / name).exists():
                    shutil.copyfile(run / stage / name, new / stage / name)
            if stage in cards:
                write_atomically(new / stage / "card.md", partial(Path.write_text, data=cards[stage], encoding="utf-8"))
