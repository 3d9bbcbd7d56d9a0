"""Experiments that train: both priors against the time that they are given (section 5.1), and what each choice is worth, taken back one at a time.

The trainings are short, and stand on the frozen CLIP of the weights that they are given; a run that was stopped goes on when called again.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from minunclip.config import CPU, DiffusionPriorConfig, TrainingConfig
from minunclip.data.captions import compare, parse
from minunclip.data.render import render
from minunclip.data.scenes import sample_scenes
from minunclip.data.world import HELD_OUT_SEED, to_tensor
from minunclip.evaluation import accuracy, frechet_distance, held_out_captions
from minunclip.experiments import Table, believed, seeds_apart, written_on
from minunclip.loading import config_to_json
from minunclip.models.decoder import Decoder
from minunclip.models.diffusion_prior import DiffusionPrior, LatentScale
from minunclip.pipeline import UnCLIP
from minunclip.runs import Run
from minunclip.stages import prepare
from minunclip.training import fit, read_checkpoint, read_log, save_model

SCENES = 20_000  # training scenes: a third of the cpu preset's
STEPS = 8  # in which a judged picture is drawn: DPM-Solver++ has no more right with 25 (docs/results.md, Tab. 3)
AS_IT_IS, LAST_STEP = "as it is", "no moving average"  # rows: the second is the same training as the first, with the weights of its last step
CANDIDATES = {"one sample": 1, "best of four": 4}  # rows of the same training, too: as it is the prior keeps the better of two


def short_run(model: UnCLIP, folder: Path, seed: int, scenes: int = SCENES) -> Run:
    """A run for models of the same sizes as `model`'s, on its frozen CLIP and its tokenizer, in a folder in `folder` of that CLIP and that seed."""
    configs = {stage.replace("-", "_"): network.config for stage, network in model.models.items() if stage in CPU.models}
    preset = replace(CPU, world=replace(CPU.world, training_scenes=scenes, upsampler_scenes=64), **configs)
    clip = model.models["clip"]
    digest = hashlib.sha256(b"".join(parameter.detach().cpu().numpy().tobytes() for parameter in clip.parameters())).hexdigest()[:8]
    home = folder / f"clip-{digest}-seed-{seed}"
    save_model(home / "clip", clip, config_to_json(preset.clip))
    return Run(preset, home, model.device, seed, tokenizer=model.tokenizer)


def _fit(run: Run, stage: str, name: str, change: Callable[[nn.Module], None] | None = None, stop_after: int | None = None) -> nn.Module:
    """The moving average of a model of `stage` trained in the folder `name`, changed before the first step."""
    settings, model, batch, loss, looks = prepare(stage, run)
    if change is not None:
        change(model)
    looks.pop("sample", None)
    config = config_to_json(model.config)
    return fit(model, batch, loss, settings, run.folder / name, name=stage, model_config=config, seed=run.seed, stop_after=stop_after, **looks)


def _with_steps(run: Run, stage: str, **settings: Any) -> Run:
    return replace(run, preset=replace(run.preset, training=run.preset.training | {stage: replace(run.preset.training[stage], **settings)}))


def _take_last_step(network: nn.Module, folder: Path) -> None:
    """Puts the weights of the last step of the training in `folder` in the place of their moving average."""
    network.load_state_dict(read_checkpoint(folder / "training.pt")["model"])


class Judge:
    """How good priors and decoders are on the same held-out captions, always with the same seeds."""

    def __init__(self, model: UnCLIP, count: int, seed: int):
        self.model, self.count, self.seeds = model, count, seeds_apart(count, seed)
        pairs = held_out_captions(count, HELD_OUT_SEED + seed)
        self.texts, side = [text for _, text in pairs], model.models["clip"].config.image_size
        self.z_i, self.seen_small = (model.embed(to_tensor(render([scene for scene, _ in pairs], size))) for size in (side, model.sizes[0]))
        self.text = model.read(self.texts)

    def prior(self, stage: str, network: nn.Module) -> dict[str, float]:
        """Cosine to the true z_i, Fréchet distance to the true ones, captions that the decoder's pictures get right, seconds an embedding."""
        trial = UnCLIP({**self.model.models, stage: network.eval()}, self.model.tokenizer)
        start = time.perf_counter()
        z_i = trial.draw_embeddings(self.text, "diffusion" if stage == "prior" else "autoregressive", self.seeds[0])[0]
        seconds = (time.perf_counter() - start) / self.count
        figures = {"cosine": float((z_i * self.z_i).sum(dim=1).mean()), "FID of z_i": frechet_distance(self.z_i, z_i)}
        return figures | {"all_right": self._right(trial.decode(z_i, self.text, self.seeds[1], steps=STEPS))["all_right"], "seconds": seconds}

    def decoder(self, network: Decoder) -> dict[str, float]:
        """Of pictures of the true z_i, with captions where it has learned from some: what is right, and the Fréchet distance in CLIP's space."""
        trial = UnCLIP({**self.model.models, "decoder": network.eval()}, self.model.tokenizer)
        images = trial.decode(self.z_i, None if network.config.caption_drop == 1 else self.text, self.seeds[1], steps=STEPS)
        right = self._right(images)
        return {name: right[name] for name in ("shape", "colour", "all_right")} | {"FID": frechet_distance(self.seen_small, trial.embed(images))}

    def _right(self, images: torch.Tensor) -> dict[str, float]:
        scenes = self.model.models["checker"].read(images)
        return accuracy([compare(parse(text), scene) for text, scene in zip(self.texts, scenes)])


def _seconds_a_step(run: Run, stage: str, name: str) -> float:
    """Of a training of 30 steps in the folder `name`, the first ten left out."""
    _fit(run, stage, name)
    seconds = {line["step"]: line["seconds"] for line in read_log(run.folder / name / "log.jsonl")}
    return (seconds[30] - seconds[10]) / 20


def race(model: UnCLIP, folder: Path, count: int = 200, stops: Sequence[int] = (100, 200, 400, 800), scenes: int = SCENES, seed: int = 11) -> Table:
    """Section 5.1: both priors, of the same width and depth, on the same captions, after the same seconds of training: those that the diffusion
    prior needs for `stops` steps. Learning rates fall to nothing at the last stop alone.
    """
    judge, table, run = Judge(model, count, seed), {}, short_run(model, folder, seed, scenes)
    stages = {"prior": "diffusion prior", "ar-prior": "AR prior"}
    pace = {stage: _seconds_a_step(_with_steps(run, stage, steps=30, batch_size=128), stage, f"race-pace-{stage}") for stage in stages}
    for stage, name in stages.items():
        own = [max(1, round(stop * pace["prior"] / pace[stage])) for stop in stops]
        timed = _with_steps(run, stage, steps=own[-1], batch_size=128)
        for before, stop, of_prior in zip((None, *own), own, stops):
            where = run.folder / f"race-{stage}-{stop}"  # each stop in a folder of its own, so that a race can be judged again
            if before is not None and not where.exists():
                shutil.copytree(run.folder / f"race-{stage}-{before}", where)
            network = _fit(timed, stage, where.name, stop_after=stop)
            trained = read_log(where / "log.jsonl")[-1]["seconds"]
            table[f"{name}, time of {of_prior}"] = {"training seconds": trained, "steps": float(stop), **judge.prior(stage, network)}
    return table


def _scaled(by: float) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        assert isinstance(model, DiffusionPrior)
        model.latent_scale = model.condition.latent_scale = LatentScale(by * model.latent_scale.factor)

    return change


def _unmasked(model: nn.Module) -> None:
    """Every token sees every other, later ones too."""
    assert isinstance(model, DiffusionPrior)
    model.causal = False


def _objective(config: DiffusionPriorConfig, objective: str) -> DiffusionPriorConfig:
    return replace(config, diffusion=replace(config.diffusion, objective=objective))  # type: ignore[arg-type]


def prior_choices(model: UnCLIP, folder: Path, count: int = 200, steps: int = 400, scenes: int = SCENES, seed: int = 12) -> Table:
    """What each choice of the diffusion prior is worth, at a third of its training steps and half of its batch."""
    judge, table, run = Judge(model, count, seed), {}, _with_steps(short_run(model, folder, seed, scenes), "prior", steps=steps, batch_size=128)
    cases: dict[str, tuple[Run, Callable[[nn.Module], None] | None]] = {
        AS_IT_IS: (run, None),
        **dict.fromkeys((*CANDIDATES, LAST_STEP), (run, None)),
        "latent scale / 10": (run, _scaled(0.1)),
        "latent scale x 10": (run, _scaled(10)),
        "predicts epsilon": (replace(run, preset=replace(run.preset, prior=_objective(run.preset.prior, "epsilon"))), None),
        "no causal mask": (run, _unmasked),
    }
    for name, (changed, change) in cases.items():
        where = run.folder / f"prior, {AS_IT_IS if name in (*CANDIDATES, LAST_STEP) else name.replace('/', 'over')}"
        network = _fit(changed, "prior", where.name, change)
        assert isinstance(network, DiffusionPrior)
        network.config = replace(network.config, candidates=CANDIDATES.get(name, network.config.candidates))
        if name == LAST_STEP:
            _take_last_step(network, where)
        table[name] = {"training seconds": read_log(where / "log.jsonl")[-1]["seconds"], **judge.prior("prior", network)}
    return table


def _changed(config: Any, change: dict[str, Any]) -> Any:
    """The config with those of the changes whose fields it has."""
    return replace(config, **{key: value for key, value in change.items() if hasattr(config, key)})


def _decoders(
    model: UnCLIP, folder: Path, count: int, scenes: int, seed: int, settings: TrainingConfig | None, width: int, changes: dict[str, dict[str, Any]]
) -> Table:
    """Decoders with the paper's drops, at half the width of `model`'s and a seventh of its training: one as it is, then one for each change.

    A change names fields of DecoderConfig or DiffusionConfig. Validation losses compare rows of one objective only, and are known of moving averages alone.
    """
    judge, table, run = Judge(model, count, seed), {}, short_run(model, folder, seed, scenes)
    own = replace(run.preset.decoder, unet=replace(run.preset.decoder.unet, width=width), embedding_drop=0.1, caption_drop=0.5)
    training = run.preset.training | {"decoder": settings or replace(run.preset.training["decoder"], steps=1000, batch_size=32, ema_decay=0.99)}
    for name, change in {AS_IT_IS: {}, **changes}.items():
        assert all(hasattr(own, key) or hasattr(own.diffusion, key) for key in change), change
        decoder = _changed(replace(own, diffusion=_changed(own.diffusion, change)), change)
        where = run.folder / f"decoder, {AS_IT_IS if name == LAST_STEP else name}"
        network = _fit(replace(run, preset=replace(run.preset, decoder=decoder, training=training)), "decoder", where.name)
        assert isinstance(network, Decoder)
        last = read_log(where / "log.jsonl")[-1]
        figures = {"training seconds": last["seconds"]}
        if name == LAST_STEP:
            _take_last_step(network, where)
        else:
            figures["validation loss"] = last["validation_loss"]
        table[name] = figures | judge.decoder(network)
    return table


def decoder_objectives(
    model: UnCLIP, folder: Path, count: int = 200, scenes: int = SCENES, seed: int = 13, settings: TrainingConfig | None = None, width: int = 64
) -> Table:
    """What the decoder is asked for: x_0 as it is, or, as in the paper, the noise with a learned variance, or v."""
    changes: dict[str, dict[str, Any]] = {
        "predicts epsilon and a variance": {"objective": "epsilon", "learned_variance": True},
        "predicts v": {"objective": "v"},
    }
    return _decoders(model, folder, count, scenes, seed, settings, width, changes)


def decoder_choices(
    model: UnCLIP, folder: Path, count: int = 200, scenes: int = SCENES, seed: int = 13, settings: TrainingConfig | None = None, width: int = 64
) -> Table:
    """What each other choice of the decoder is worth: context tokens, drops, captions, the moving average."""
    changes: dict[str, dict[str, Any]] = {
        LAST_STEP: {},
        "1 context token": {"context_tokens": 1},
        "8 context tokens": {"context_tokens": 8},
        "embedding dropped in 5 %": {"embedding_drop": 0.05},
        "caption never shown": {"caption_drop": 1.0},
    }
    return _decoders(model, folder, count, scenes, seed, settings, width, changes)


def words_alone(model: UnCLIP, folder: Path, count: int = 200, steps: int = 200, scenes: int = SCENES, seed: int = 17) -> Table:
    """Section 4: does the typographic attack come from captions? CLIP as it is, trained further on captions of the kind that it knows, and trained further
    where the caption of a picture with a word is that word and nothing else, as in the wild it may be. What is read off: `experiments.believed`.
    """
    run = _with_steps(short_run(model, folder, seed, scenes), "clip", steps=steps, batch_size=128, learning_rate=3e-4)
    known = run.world
    alone = np.array(known.captions)
    written = [(row, scene.word) for number, scene in enumerate(sample_scenes(scenes // 2, seed)) for row in (2 * number, 2 * number + 1) if scene.word]
    for row, word in written:  # of a scene and of its twin, at every level
        alone[row] = known.tokenizer([word], alone.shape[2])[0].numpy()
    cases, wanted = written_on(count, seed)
    clips = {AS_IT_IS: model.models["clip"]}

    def begin(new: nn.Module) -> None:
        new.load_state_dict(clips[AS_IT_IS].state_dict())

    for name, captions in (("trained further", known.captions), ("the word alone", alone)):
        run.world = replace(known, captions=captions)
        clips[name] = _fit(run, "clip", f"clip, {name}", begin)
    table = {}
    for name, clip in clips.items():
        trial = UnCLIP({**model.models, "clip": clip.eval()}, model.tokenizer)
        for case in ("no word", "another shape's word"):
            z_i = trial.embed(to_tensor(render(cases[case], clip.config.image_size)))
            table[f"{name}: {case}"] = believed(trial, cases[case], z_i, wanted)
    return table


TRAININGS: dict[str, Callable[..., Table]] = {
    function.__name__.replace("_", "-"): function for function in (words_alone, race, prior_choices, decoder_objectives, decoder_choices)
}
