"""The command line, one function a command (COMMANDS lists them). Bad input ends with one line on stderr and exit code 2."""

import inspect
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from jsonargparse import ArgumentParser
from tqdm import tqdm

from minunclip import report, report_own
from minunclip.ablations import TRAININGS
from minunclip.aesthetics import fit_probe, read_ratings
from minunclip.budget import PEAK, cost, measure, memory
from minunclip.budget import as_text as budget_as_text
from minunclip.config import BASELINES, PRESETS, STAGES, Preset, TrainingConfig
from minunclip.data.captions import LEVELS, caption, never_said
from minunclip.data.checker import matches
from minunclip.data.collection import refusal
from minunclip.data.emoji import build_emoji
from minunclip.data.files import Crop, Unusable, check_folder, read_lines, read_square
from minunclip.data.render import render
from minunclip.data.scenes import sample_scenes
from minunclip.data.world import load_world, to_tensor, to_uint8
from minunclip.distributed import first_one_then_all, ranks
from minunclip.distributed import start as start_processes
from minunclip.evaluation import held_out_captions
from minunclip.experiments import CURVES, EXPERIMENTS, as_markdown, over_seeds, unused, with_seed
from minunclip.export import export_onnx
from minunclip.hub import local_folder
from minunclip.hub import push as push_folder
from minunclip.loading import MODELS, read_json
from minunclip.packing import pack as pack_run
from minunclip.pipeline import GUIDANCE, PRIOR_GUIDANCE, PriorName, UnCLIP, hashes, require_seed, weights_id
from minunclip.plots import curve_figure, picture_grid, save_figure, stages_figure, table_figure
from minunclip.runs import Run, adopt_clip, on_clip, preset_named, published_clip, tile
from minunclip.safety import find_terms, read_terms, save_picture, sign
from minunclip.stages import WHOLE
from minunclip.stages import train as train_stage
from minunclip.tracking import require_tensorboard
from minunclip.training import TrainingError, write_atomically

WEIGHTS = Path(__file__).resolve().parents[1] / "data" / "weights"
SAMPLES = 64  # in the picture of an evaluation
AT_ONCE = 50  # pictures that `sample` draws together
Device = Literal["auto", "cuda", "mps", "cpu"]


def pick_device(name: Device) -> torch.device:
    """`auto` is the first of cuda, mps, cpu that is there."""
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name != "auto":
        if not here[name]:
            raise ValueError(f"this machine has no {name}: use --device {' or '.join(kind for kind, there in here.items() if there)}")
        return torch.device(name)
    return torch.device("cuda" if here["cuda"] else "mps" if here["mps"] else "cpu")


def train(
    stage: Literal["clip", "prior", "ar-prior", "decoder", "upsampler1", "upsampler2", "checker", "glide", "dalle-vae", "dalle", "all"],
    preset: Literal["tiny", "course", "cpu", "long", "gpu", "paper"] = "cpu",
    out: str | None = None,
    seed: int = 0,
    device: Device = "auto",
    resume: Literal["auto", "never"] = "auto",
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
    accumulation: int | None = None,
    recompute: bool | None = None,
    compile: bool | None = None,
    sharded: bool | None = None,
    track: bool = False,
    data: str | None = None,
    crop: Crop = "centre",
    stream: bool = False,
    init: str | None = None,
    clip: str | None = None,
    dry_run: bool = False,
) -> None:
    """Train one stage, or all of unCLIP in order; settings that are not given are the preset's, `out` is runs/PRESET. A run that was cut short goes on.

    `data`: a folder of your own pictures with captions (minunclip/data/files.py says how they are found), in place of the captioned world; the
    checker, which reads that world, is then no part of "all". "emoji" stands for the system's, which are drawn into the folder of the run.
    `crop`: which square of each is learned from. `stream`: read them from their files when a batch asks for them, in place of keeping arrays on disk.
    `init`: a folder of weights to start from, such as data/weights.
    `clip`: a folder with a published CLIP, as the Hub has it (weights as safetensors, config, merges.txt), on whose embeddings all is trained.
    With --dry_run (or --dry-run) nothing is trained: settings, parameters, activations and the peak of memory are printed, estimated and, on a GPU, measured.
    `recompute` and `sharded` save memory, `compile` time, `track` writes for TensorBoard; minunclip/config.py and docs/scale.md say more.
    """
    if any(value is not None and value <= 0 for value in (steps, batch_size, accumulation, learning_rate)):
        raise ValueError("steps, batch_size and accumulation must be at least 1, and learning_rate above 0")
    require_seed(seed)
    if data is not None and stage == "checker":
        raise ValueError("the checker reads scenes of the captioned world and cannot learn from other pictures: leave --data out")
    if init is not None and not (Path(init) / "tokenizer.json").is_file():
        raise ValueError(f"{init} has no tokenizer.json: give --init a folder of packed weights, such as data/weights")
    if preset == "paper" and not dry_run:
        raise ValueError("the paper's sizes are there to be counted: use --dry-run, or --preset gpu")
    if track:
        require_tensorboard()
    chosen, published = preset_named(preset), None
    if clip is not None:
        if init is not None or stage == "clip":
            raise ValueError("--clip takes a CLIP as it is, to train the other stages from scratch: leave --init out, and the stage clip")
        published = published_clip(Path(clip))
        chosen = on_clip(chosen, published.config)
    folder = Path(out or f"runs/{preset}")
    started = start_processes(pick_device(device))
    if data == "emoji":
        data = str(folder / "emoji")
        with first_one_then_all():
            if not dry_run and not (folder / "emoji").is_dir():
                build_emoji(folder / "emoji")
    own, start, vocabulary = (None if path is None else Path(path) for path in (data, init, clip))
    run = Run(chosen, folder, started, seed, own, start, crop, vocabulary, stream)
    if published is not None and not dry_run:
        with first_one_then_all():
            adopt_clip(run, published)
    given = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "precision": precision, "accumulation": accumulation}
    given |= {"recompute": recompute, "compile": compile, "sharded": sharded}
    everything = [name for name in STAGES if (data is None or name != "checker") and (clip is None or name != "clip")]
    for name in everything if stage == "all" else (stage,):
        settings = run.preset.training[name]
        settings = replace(settings, accumulation=max(1, settings.accumulation // ranks()))  # what one would do in parts, several share out
        settings = replace(settings, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
        if settings.steps < run.preset.training[name].steps:  # a short training would be over before it is warm, or looked at
            quarter = max(1, settings.steps // 4)
            looks = {key: min(getattr(settings, key), quarter) for key in ("validate_every", "sample_every")}
            settings = replace(settings, warmup=min(settings.warmup, settings.steps // 10), **looks)
        if dry_run:
            print(dry(name, run, settings))
        else:
            train_stage(name, run, settings=settings, resume=resume == "auto", track=track)


def dry(stage: str, run: Run, settings: TrainingConfig) -> str:
    """What training a stage would take, in a line: counted, and on a GPU also measured in a few steps on random numbers that are thrown away."""
    config = (run.preset.models | run.preset.baselines)[stage]
    facts = [f"{parameter_counts(run.preset)[stage] / 1e6:,.2f} M parameters"]
    if stage not in ("checker", "dalle-vae", "dalle"):
        settings = replace(settings, sharded=settings.sharded and stage not in WHOLE)
        one, gpus = cost(stage, config, settings), ranks()
        facts.append(f"{one.activations / 1e6:,.1f} MB of activations an example in fp32, {settings.batch_size // settings.accumulation // gpus} at once")
        facts.append(f"about {memory(one, settings, gpus) / 1e9:,.2f} GB at the peak")
        if run.device.type == "cuda" and gpus == 1:
            try:
                peak, speed = measure(stage, config, settings, run.device)
                facts.append(f"measured {peak / 1e9:,.2f} GB, {speed:,.1f} examples/s, {speed * 3 * one.forward / PEAK:.0%} of an A100's peak")
            except torch.OutOfMemoryError:
                facts.append("measured: more than this GPU has")
    return f"{stage}: {', '.join(facts)}; on {run.device} in {run.folder / stage}, {settings}"


def warn(model: UnCLIP, captions: Sequence[str]) -> None:
    """A line on stderr for each word that the models cannot know, and for each caption that they cannot read to its end."""
    context = model.models["clip"].config.context_length
    for text in dict.fromkeys(captions):
        for word in never_said(text) if "checker" in model.models else ():  # weights without one are not of the captioned world
            print(f"warning: the models have never seen the word {word!r}", file=sys.stderr)
        if model.tokenizer.length(text) > context:
            print(f"warning: caption cut to {context} tokens: {text[:60]!r}", file=sys.stderr)


def require_text(captions: Sequence[str]) -> None:
    """ValueError for what no file can hold as UTF-8, such as an argument in another encoding: said before anything is drawn."""
    for text in captions:
        if re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{text[:60]!r} is not UTF-8 text: give the caption in that encoding")


def require_folder(option: str, path: str | None) -> None:
    """ValueError where something is to be written in a folder that is not there: said before the work is done, not after."""
    if path is not None and not Path(path).parent.is_dir():
        raise ValueError(f"{Path(path).parent} is no folder: make it first, or choose another --{option}")


def require_file(option: str, path: str | None) -> None:
    """ValueError where no file can be written: its folder is not there, or it is one itself."""
    require_folder(option, path)
    if path is not None and Path(path).is_dir():
        raise ValueError(f"{path} is a folder: give --{option} the name of a file")


def require_no_file(option: str, path: str) -> None:
    """ValueError where a file has the name of the folder that is to be written."""
    if Path(path).is_file():
        raise ValueError(f"{path} is a file: give --{option} the name of a folder")


def require_scales(*scales: float) -> None:
    """ValueError for a guidance that is no number."""
    for scale in scales:
        if not math.isfinite(scale):
            raise ValueError(f"a guidance of {scale} draws nothing: use a number, such as {GUIDANCE:g}")


def put_picture(path: Path, picture: np.ndarray, facts: dict[str, object]) -> None:
    """Saves a picture with what it is, and says where."""
    save_picture(path, picture, facts)
    print(path)


def require_picture_name(out: str) -> None:
    """ValueError unless a PNG can be written under that name."""
    require_folder("out", out)
    if Path(out).suffix.lower() != ".png" or Path(out).is_dir():
        raise ValueError(f"{out} is no name for a picture: --out must end in .png")


def sample(
    captions: list[str],
    seed: int = 0,
    out: str = "picture.png",
    count: int = 1,
    size: int | None = None,
    prior: PriorName = "diffusion",
    guidance: float = GUIDANCE,
    prior_guidance: float = PRIOR_GUIDANCE,
    weights: str = str(WEIGHTS),
    device: Device = "auto",
    blocklist: str | None = None,
    signature: bool = False,
) -> None:
    """Draw captions. One picture goes to `out`; several go to numbered files beside a grid in `out`. Seeds count up from `seed`.

    `blocklist`: a file of words, one a line, for which nothing is drawn. `signature`: five coloured squares in the lower right corner.
    """
    path = Path(out)
    require_picture_name(out)
    require_text(captions)
    terms = [] if blocklist is None else read_terms(Path(blocklist))
    for text in captions:
        if found := find_terms(text, terms):
            raise ValueError(f"{text!r} asks for {found[0]!r}, which stands in {blocklist}: nothing was drawn")
    if count < 1:
        raise ValueError(f"count is {count}: draw at least 1 picture a caption")
    require_scales(guidance, prior_guidance)
    model = UnCLIP.from_pretrained(weights, pick_device(device))
    warn(model, captions)
    texts = [text for text in captions for _ in range(count)]
    seeds = model.seeds_for([seed + i for _ in captions for i in range(count)], len(texts))
    facts: dict[str, object] = {"prior": prior, "guidance": guidance, "prior_guidance": prior_guidance}
    facts |= {"sampler": sampler_of(model), "weights": weights_id(Path(weights))}
    pictures: list[np.ndarray] = []
    for start in range(0, len(texts), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        drawn = list(model.generate(texts[part], prior, seeds[part], size, guidance, prior_guidance).pictures.values())[-1]
        for text, number, picture in zip(texts[part], seeds[part], [sign(picture) for picture in drawn] if signature else drawn):
            name = path if len(texts) == 1 else path.with_name(f"{path.stem}-{len(pictures)}{path.suffix}")
            put_picture(name, picture, {"prompt": text, "seed": number, **facts})
            pictures.append(picture)
    if len(texts) > 1:
        put_picture(path, tile(np.stack(pictures), min(8, len(pictures))), {"prompt": "\n".join(captions), "seed": seed, **facts})


def slug(text: str) -> str:
    """A caption as a short file name."""
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-_")[:60].rstrip("-") or "picture"


def sampler_of(model: UnCLIP) -> str:
    """How the decoder draws, for the facts that a picture carries."""
    diffusion = model.models["decoder"].config.diffusion
    return f"{diffusion.sampler}, {diffusion.sampling_steps} steps"


def demo(
    prompt: str = "a red circle above a blue square",
    seed: int = 0,  # README.md says with how many all of the caption comes out
    out: str = "out",
    prior: PriorName = "diffusion",
    guidance: float = GUIDANCE,
    weights: str = str(WEIGHTS),
    device: Device = "auto",
) -> None:
    """Draw one caption and how its picture came about, time every stage, and let the checker say what it sees."""
    require_text([prompt])
    require_scales(guidance)
    require_no_file("out", out)
    model = UnCLIP.from_pretrained(weights, pick_device(device))
    warn(model, [prompt])
    frames: list[np.ndarray] = []
    drawn = model.generate([prompt], prior, seed, guidance=guidance, on_step=lambda step, x_0: frames.append(to_uint8(x_0)[0]))
    pictures = {side: picture[0] for side, picture in drawn.pictures.items()}
    last = pictures[max(pictures)]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"prompt": prompt, "seed": seed, "prior": prior, "guidance": guidance, "prior_guidance": PRIOR_GUIDANCE}
    facts |= {"sampler": sampler_of(model), "weights": weights_id(Path(weights))}
    put_picture(folder / f"{slug(prompt)}.png", last, facts)
    strip = folder / f"{slug(prompt)}-stages.png"
    stages_figure(strip, prompt, drawn.candidates[0].tolist(), frames, pictures, facts)
    print(strip)
    print("seconds: " + ", ".join(f"{stage} {value:.2f}" for stage, value in drawn.seconds.items()) + f", all {sum(drawn.seconds.values()):.2f}")
    if "checker" in model.models:
        print(f"checker: {matches(to_tensor(last[None])[0], prompt, model.models['checker'])}")
    else:
        print(f"checker: {Path(weights) / 'checker'} is not there, so nobody looked at the picture")


def read_captions(path: Path) -> list[str]:
    """A text file with one caption a line; empty lines are skipped."""
    captions = read_lines(path)
    if not captions:
        raise ValueError(f"{path} has no captions: write one a line")
    return captions


def evaluate(
    captions: str | None = None,
    json: str | None = None,
    samples: str | None = None,
    count: int = 1000,
    enlarged: int = report.ENLARGED,
    seed: int = 0,
    size: int | None = None,
    prior: PriorName = "diffusion",
    guidance: float = GUIDANCE,
    weights: str = str(WEIGHTS),
    device: Device = "auto",
) -> None:
    """Measure CLIP, the priors and the pictures on `count` captions of the held-out split, or on a file with a caption a line.

    `enlarged`: of how many captions pictures are judged after the upsamplers too, which take most of the time.
    `samples`: the first 64 of these pictures, none left out, each under its caption; the first has seed `seed`, the next the next.
    """
    if count < 4:
        raise ValueError(f"count is {count}: judge at least 4 captions, precision and recall need as many")
    require_file("json", json)
    require_file("samples", samples)
    require_seed(seed)
    require_scales(guidance)
    texts = None if captions is None else read_captions(Path(captions))
    model = UnCLIP.from_pretrained(weights, pick_device(device))
    model.require_prior(prior)
    if texts is not None:
        warn(model, texts)
    first: list[np.ndarray] = []

    def look(pictures: np.ndarray) -> None:
        first.extend(pictures[: SAMPLES - len(first)])

    figures = report.evaluate(model, texts, count, seed, size, prior, guidance, enlarged, lambda line: print(line, file=sys.stderr, flush=True), look)
    figures["weights"] = weights_id(Path(weights), without=BASELINES)
    if json is not None:
        write_atomically(Path(json), lambda path: path.write_text(dumps(figures, indent=1)))
    if samples is not None:
        shown = (texts or [text for _, text in held_out_captions(count)])[:SAMPLES]
        grid = picture_grid(first, [f"{seed + i}: {text}" for i, text in enumerate(shown)])
        facts = {"prompt": "\n".join(shown), "seed": seed, "prior": prior, "guidance": guidance, "prior_guidance": PRIOR_GUIDANCE}
        save_figure(Path(samples), grid, facts | {"sampler": sampler_of(model), "weights": weights_id(Path(weights))}, dpi=90)
    print(report.as_text(figures))


def experiment(name: str, out: str | None = None, seeds: int = 1, weights: str = str(WEIGHTS), run: str = "runs/experiments", device: Device = "auto") -> None:
    """Repeat an experiment of the paper, or `all`, and print its table; with --out, also write it into that folder as NAME.json and NAME.png.

    With more --seeds than one, figures are means, each with its standard deviation. Those that train do so in the folder --run.
    `all` goes on where it stopped: what --out has of the same weights stays, seed by seed; by its name an experiment runs anew.
    """
    known = [*EXPERIMENTS, *TRAININGS]
    if name not in (*known, "all"):
        raise ValueError(f"no experiment {name!r}: choose one of {', '.join(known)}, or all")
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}: use 1 or more")
    require_folder("out", None if out is None else f"{out}/{name}.json")
    model = UnCLIP.from_pretrained(weights, pick_device(device))
    if "checker" not in model.models:
        raise ValueError(f"{weights} has no checker, which judges the pictures of the captioned world: of your own, `minunclip data evaluate` counts")
    for one in known if name == "all" else [name]:
        used = weights_id(Path(weights), without=unused(one))
        file = None if out is None else Path(out) / f"{one}.json"
        figures = read_json(file) if name == "all" and file is not None and file.exists() else {}
        if figures.get("weights") != used or (figures["seeds"] < seeds and "by seed" not in figures):
            figures = {"weights": used, "seeds": 0, "minutes": 0.0, "by seed": []}
        function = EXPERIMENTS[one] if one in EXPERIMENTS else partial(TRAININGS[one], folder=Path(run))
        for number in range(figures["seeds"], seeds):
            start = time.perf_counter()
            tables = [*figures["by seed"], with_seed(function, model, number)]
            minutes = round(figures["minutes"] + (time.perf_counter() - start) / 60, 1)
            figures = {"weights": used, "seeds": len(tables), "minutes": minutes, "table": over_seeds(tables), "by seed": tables}
            if file is not None:
                table = figures["table"]
                figure = curve_figure(table, CURVES[one]) if one in CURVES else table_figure(table)
                save_figure(file.with_suffix(".png"), figure, {"experiment": one, "seeds": len(tables), "weights": used}, dpi=100)
                write_atomically(file, partial(Path.write_text, data=dumps(figures, indent=1)))
        print(f"{one}\n\n{as_markdown(figures['table'])}", flush=True)


def rate(ratings: str, pictures: list[str], weights: str = str(WEIGHTS), device: Device = "auto") -> None:
    """Learn from your ratings (a CSV with file_name and rating) what you like, by a linear probe on CLIP (section 5.5), and rate other pictures."""
    model, rows = UnCLIP.from_pretrained(weights, pick_device(device)), read_ratings(Path(ratings))
    side = model.models["clip"].config.image_size

    def read(path: Path) -> np.ndarray:
        try:
            return np.asarray(read_square(path.read_bytes()).resize((side, side)))
        except Unusable as reason:
            raise ValueError(f"{path} is {reason}: leave it out, or repair it") from None

    def embed(paths: Sequence[Path]) -> torch.Tensor:
        return model.embed(to_tensor(np.stack([read(path) for path in paths]))).cpu()

    z_i, given = embed([path for path, _ in rows]), torch.tensor([rating for _, rating in rows])
    if len(rows) >= 10:
        parts = [torch.arange(len(rows)) % 5 == k for k in range(5)]  # each fifth is rated by a probe that has seen the others
        guessed = torch.cat([fit_probe(z_i[~part], given[~part])(z_i[part]) for part in parts])
        print(f"correlation with ratings it had not seen: {torch.corrcoef(torch.stack([guessed, torch.cat([given[part] for part in parts])]))[0, 1]:.2f}")
    for path, rating in zip(pictures, fit_probe(z_i, given)(embed([Path(path) for path in pictures]))):
        print(f"{rating:.2f} {path}")


def pack(run: str, weights: str) -> None:
    """Turn the folder of a training run into a folder of weights that ships."""
    pack_run(Path(run), Path(weights))


def push(folder: str, name: str, figures: str | None = None, private: bool = False) -> None:
    """Upload packed weights to the Hub as owner/name, with a card. `figures`: what `evaluate --json` wrote for these very weights."""
    tables = ""
    if figures is not None:
        found = read_json(Path(figures), "write it with `minunclip evaluate --json`")
        if "clip" not in found:
            raise ValueError(f"{figures} has no figures of the held-out split: write it with `minunclip evaluate --json`, without --captions")
        if found.get("weights") != weights_id(Path(folder), without=BASELINES):
            raise ValueError(f"{figures} has the figures of other weights than those in {folder}: evaluate these")
        tables = report.as_markdown(found)
    UnCLIP.from_pretrained(folder)  # whole, and made for one another
    print(push_folder(Path(folder), name, private, tables))


def export(onnx: str, weights: str = str(WEIGHTS)) -> None:
    """Write the chain as ONNX files with a manifest, for programs without PyTorch, and compare each file with PyTorch by onnxruntime."""
    require_folder("onnx", onnx)
    require_no_file("onnx", onnx)
    for name, difference in export_onnx(UnCLIP.from_pretrained(weights), Path(onnx)).items():
        path = Path(onnx) / name
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, differs from PyTorch by {difference:.1e} at most")


def parameter_counts(preset: Preset) -> dict[str, int]:
    """Parameters of every model of a preset, by stage; on the meta device, which holds no numbers, so even `paper` fits."""
    with torch.device("meta"):
        return {stage: sum(p.numel() for p in MODELS[stage][0](config).parameters()) for stage, config in (preset.models | preset.baselines).items()}


def info(weights: str = str(WEIGHTS), preset: Literal["tiny", "course", "cpu", "long", "gpu", "paper"] | None = None, budget: bool = False) -> None:
    """Print the device, the parameters of every preset, and the weights with their hashes; with --budget, what training a preset costs."""
    if budget:
        print(budget_as_text(preset_named(preset or "cpu")))
        return
    print(f"device: {pick_device('auto')}")
    for name in PRESETS if preset is None else (preset,):
        print(f"{name}: " + ", ".join(f"{stage} {number / 1e6:,.2f} M" for stage, number in parameter_counts(PRESETS[name]).items()))
    found = hashes(Path(weights))
    for stage in STAGES + BASELINES:
        print(f"{Path(weights) / stage / 'model.safetensors'}: {found.get(stage, 'not there')}")


def preview(out: str = "preview.png", seed: int = 0, count: int = 32, held_out: bool = False) -> None:
    """Draw scenes of the captioned world, and print one caption each."""
    if count < 1:
        raise ValueError(f"count is {count}: draw at least 1 scene")
    require_seed(seed)
    require_picture_name(out)
    scenes, rng = sample_scenes(count, seed, held_out), np.random.default_rng(seed)
    put_picture(Path(out), tile(render(scenes, 128)), {"seed": seed})
    for i, scene in enumerate(scenes):
        print(caption(scene, LEVELS[i % len(LEVELS)], rng))


def check(folder: str, out: str | None = None) -> None:
    """Say what a training on a folder of your own pictures would use and what it would skip; with `out`, draw some of them."""
    if out is not None:
        require_picture_name(out)
    found = check_folder(Path(folder), tqdm)
    print(f"{len(found.pictures)} pictures can be used, {len(found.skipped)} are skipped ({found.reasons()})")
    for name, reason in found.skipped:
        print(f"  {name}: {reason}")
    lengths = sorted(len(text.split()) for picture in found.pictures for text in picture.captions)
    if lengths:
        print(f"{len(lengths)} captions, of {lengths[0]} to {lengths[-1]} words, half of them up to {lengths[len(lengths) // 2]}")
    for low in range(0, max(lengths, default=-1) + 1, 5):
        count = sum(low <= length < low + 5 for length in lengths)
        print(f"  {low:3} to {low + 4:3} words: {count:6} {'#' * round(40 * count / len(lengths))}")
    if problem := refusal(found, len(found.pictures)):
        print(f"a training would stop: {problem}")
    if out is not None and found.pictures:
        shown = found.pictures[:: max(1, len(found.pictures) // 32)][:32]
        put_picture(Path(out), tile(np.stack([np.asarray(read_square(picture.content()).resize((128, 128))) for picture in shown])), {"folder": folder})


def evaluate_own(
    run: str,
    weights: str | None = None,
    json: str | None = None,
    samples: str | None = None,
    count: int = 256,
    seed: int = 0,
    guidance: float = GUIDANCE,
    device: Device = "auto",
) -> None:
    """Measure packed weights (RUN-weights unless others are given) on pictures that the run learned from and on those that it held out, apart.

    `samples`: a sheet of true pictures, of what is drawn from their captions, and of the training pictures that are nearest to these.
    """
    if count < 2:
        raise ValueError(f"count is {count}: judge at least 2 pictures")
    require_seed(seed)
    require_scales(guidance)
    require_file("json", json)
    require_file("samples", samples)
    worlds = sorted(Path(run).glob("data/world-*/done"))
    if len(worlds) != 1:
        raise ValueError(f"{run} has the data of {len(worlds)} trainings: give the folder of one, as in --out")
    packed = Path(weights or f"{Path(run)}-weights")
    model = UnCLIP.from_pretrained(packed, pick_device(device))
    world = load_world(worlds[0].parent)
    figures, shown, titles = report_own.evaluate_own(model, world, count, seed, guidance, lambda line: print(line, file=sys.stderr, flush=True))
    facts = {"weights": weights_id(packed), "count": count, "seed": seed, "guidance": guidance, "prior_guidance": PRIOR_GUIDANCE}
    if json is not None:
        write_atomically(Path(json), lambda path: path.write_text(dumps({**facts, "figures": figures}, indent=1)))
    if samples is not None:
        save_figure(Path(samples), picture_grid(shown, titles), {**facts, "sampler": sampler_of(model)}, dpi=80)
    print(report_own.as_markdown(figures))


def emoji(out: str = "emoji", font: str | None = None) -> None:
    """Draw the system's colour emoji into a folder of captioned pictures to train on; `font` is the file of another font."""
    build_emoji(Path(out), font)


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "sample": sample,
    "demo": demo,
    "evaluate": evaluate,
    "experiment": experiment,
    "rate": rate,
    "data preview": preview,
    "data check": check,
    "data emoji": emoji,
    "data evaluate": evaluate_own,
    "info": info,
    "pack": pack,
    "push": push,
    "export": export,
}
POSITIONAL = {
    "train": ("stage",),
    "sample": ("captions",),
    "demo": ("prompt",),
    "experiment": ("name",),
    "rate": ("ratings", "pictures"),
    "pack": ("run", "weights"),
    "push": ("folder", "name"),
    "data check": ("folder",),
    "data evaluate": ("run",),
}


class OneLineParser(ArgumentParser):
    """A parser whose errors are one line, and no page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        self.exit(2, f"minunclip: {' '.join(message.split())}; see {self.prog.replace(' [options]', '')} --help\n")


def _command(name: str) -> ArgumentParser:
    """The parser of one function: what stands in POSITIONAL is given by place, all else by --name, or in a YAML file by --config."""
    function = COMMANDS[name]
    command = OneLineParser(description=inspect.getdoc(function))
    command.add_argument("--config", action="config", help="a YAML file with options")
    places = POSITIONAL.get(name, ())
    for place in places:
        kind = function.__annotations__[place]
        how: dict[str, Any] = {"nargs": "+", "type": str} if kind == list[str] else {"type": kind}
        default = inspect.signature(function).parameters[place].default
        if default is not inspect.Parameter.empty:
            how |= {"nargs": "?", "default": default}
        command.add_argument(place, **how)
    command.add_function_arguments(function, skip=set(places))
    return command


def make_parser() -> ArgumentParser:
    """One sub-command a function; `data` has sub-commands of its own."""
    parser = OneLineParser(prog="minunclip", description="unCLIP, trained from scratch.")
    commands = parser.add_subcommands(required=True)
    data = OneLineParser(description="The captioned world, or your own pictures.")
    for name in COMMANDS:
        if " " not in name:
            commands.add_subcommand(name, _command(name))
    commands.add_subcommand("data", data)
    looks = data.add_subcommands(required=True)
    for name in COMMANDS:
        if name.startswith("data "):
            looks.add_subcommand(name.removeprefix("data "), _command(name))
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] in (["train"], ["info"], ["sample"], ["push"], ["data"]):  # jsonargparse wants a value for every option
        flags = ("--dry_run", "--budget", "--signature", "--private", "--recompute", "--compile", "--sharded", "--track", "--stream", "--held_out")
        given = ["--dry_run" if word == "--dry-run" else word for word in given]
        given = [f"{word}=true" if word in flags and after not in ("true", "false") else word for word, after in zip(given, [*given[1:], ""])]
    try:
        parsed = make_parser().parse_args(given)
    except SystemExit as stop:  # --help, or a bad option
        return int(stop.code or 0)
    except UnicodeDecodeError:
        print("minunclip: the file of --config is not UTF-8 text: save it with that encoding", file=sys.stderr)
        return 2
    name, options = parsed.subcommand, parsed[parsed.subcommand]
    if name == "data":
        name, options = f"data {options.subcommand}", options[options.subcommand]
    values = options.as_dict()
    values.pop("config", None)
    try:
        for option in ("weights", "init"):  # both may be names of the Hub; what `pack` calls weights is where they go to
            if name != "pack" and values.get(option) is not None:
                values[option] = str(local_folder(values[option]))
        COMMANDS[name](**values)
        sys.stdout.flush()
    except KeyboardInterrupt:
        how = "with --resume auto in place of never the command" if values.get("resume") == "never" else "the same command"
        print("stopped" + (f"; {how} goes on from the last checkpoint" if name == "train" else ""), file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TrainingError, OSError) as error:
        print(f"minunclip: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
