"""What training looks like when all is well, and when something is off: `data/expected`, with which `course.compare_run` compares a student's log.

    python benchmarks/expected.py [--run runs/expected] [--stages clip prior …]

The six stages of unCLIP in the `course` preset, by four seeds: three make the band, the fourth is left out of it, to test it. With the fourth seed
each stage is also trained with every fault that can befall it. What is in --run already is not trained again.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from minunclip.config import COURSE, Preset, TrainingConfig
from minunclip.curves import EXPECTED, FIGURES, band
from minunclip.models import autoregressive_prior
from minunclip.models.clip import CLIP
from minunclip.models.diffusion_prior import LatentScale
from minunclip.models.transformer import Cache, Transformer
from minunclip.runs import Run
from minunclip.stages import prepare
from minunclip.training import Diverged, fit, read_log

SEEDS = (0, 1, 2)
LEFT_OUT = 3
STAGES = ("clip", "prior", "ar-prior", "decoder", "upsampler1", "upsampler2")
TOO_MUCH = {"learning rate too high": 30.0, "learning rate too low": 1 / 30}
FAULTS = {  # beside a wrong learning rate, which every stage can have
    "clip": ("no temperature",),
    "prior": ("no latent scale", "never dropped", "always dropped"),
    "ar-prior": ("no causal mask", "never dropped", "always dropped"),
    "decoder": ("no latent scale", "never dropped", "always dropped"),
}


class Peeking(Transformer):
    """Trained without the causal mask. Sampling goes token by token, and has nothing to peek at."""

    def forward(self, x: Tensor, causal: bool, key_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        return super().forward(x, causal and cache is not None, key_mask, cache)


@contextmanager
def broken(fault: str | None) -> Iterator[None]:
    if fault == "no latent scale":
        with patch.object(LatentScale, "for_dim", classmethod(lambda cls, dim: cls(1.0))):
            yield
    elif fault == "no causal mask":
        with patch.object(autoregressive_prior, "Transformer", Peeking):  # the prior's alone: CLIP keeps its own
            yield
    elif fault == "no temperature":
        with patch.object(CLIP, "scale", lambda self: torch.ones(())):
            yield
    else:
        yield


def preset_with(fault: str | None) -> Preset:
    chance = {"never dropped": 0.0, "always dropped": 1.0}.get(fault or "")
    if chance is None:
        return COURSE
    priors = {name: replace(getattr(COURSE, name), text_drop=chance) for name in ("prior", "ar_prior")}
    return replace(COURSE, **priors, decoder=replace(COURSE.decoder, embedding_drop=chance, caption_drop=chance))


def train(stage: str, folder: Path, seed: int, fault: str | None = None) -> list[dict[str, float]]:
    """The log of one training, kept in folder / seed / stage, with the fault in its name."""
    run = Run(preset_with(fault), folder / f"seed-{seed}", torch.device("cpu"), seed)
    settings = COURSE.training[stage]
    settings = replace(settings, learning_rate=settings.learning_rate * TOO_MUCH.get(fault or "", 1.0))
    if stage in ("prior", "ar-prior", "decoder"):
        _ = run.image_embeddings  # before anything is broken
    place = run.folder / (stage if fault is None else f"{stage}, {fault}")
    with broken(fault):
        settings, model, batch, loss, looks = prepare(stage, run, settings)
        try:
            fit(model, batch, loss, settings, place, name=place.name, model_config=asdict(model.config), seed=seed, validate=looks["validate"])
        except Diverged as error:  # at a learning rate that is far too large
            print(error)
    return [{key: float(f"{line[key]:.4g}") for key in ("step", *FIGURES) if key in line} for line in read_log(place / "log.jsonl")]


def settings_of(stage: str) -> dict[str, object]:
    kept: TrainingConfig = COURSE.training[stage]
    return {"preset": "course", "steps": kept.steps, "batch_size": kept.batch_size, "learning_rate": kept.learning_rate, "seeds": list(SEEDS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/expected")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    given = parser.parse_args()
    for stage in given.stages:
        good = [train(stage, Path(given.run), seed) for seed in (*SEEDS, LEFT_OUT)]
        faulty = {fault: train(stage, Path(given.run), LEFT_OUT, fault) for fault in (*TOO_MUCH, *FAULTS.get(stage, ()))}
        EXPECTED.mkdir(parents=True, exist_ok=True)
        (EXPECTED / f"{stage}.json").write_text(json.dumps({**settings_of(stage), "curves": band(good[:-1])}) + "\n")
        (EXPECTED / f"{stage}-runs.json").write_text(json.dumps({"as expected": good[-1], **faulty}) + "\n")
        print(stage, "done", flush=True)


if __name__ == "__main__":
    main()
