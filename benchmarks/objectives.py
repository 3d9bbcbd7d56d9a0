"""What the decoder should predict: epsilon with a learned variance (the paper), v, or x_0, all else alike.

    python benchmarks/objectives.py [--run runs/cpu] [--steps 800] [--json FILE]

The same network, data, batches, seed and number of steps; only the objective changes (and, with a learned variance, the width of the last layer).
Pictures are drawn from the true z_i and the full caption of held-out scenes, and judged by the checker of --run.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from minunclip.config import CPU, DiffusionConfig
from minunclip.data.captions import caption, compare, parse
from minunclip.data.render import render
from minunclip.data.scenes import sample_scenes
from minunclip.data.world import to_tensor, trim
from minunclip.diffusion import make_schedule
from minunclip.evaluation import accuracy
from minunclip.loading import load_model
from minunclip.models.decoder import sample_decoder
from minunclip.models.diffusion_prior import LatentScale
from minunclip.runs import Run
from minunclip.stages import prepare
from minunclip.training import fit

OBJECTIVES = {
    "epsilon, learned variance": DiffusionConfig("cosine", "epsilon", learned_variance=True, sampler="ancestral", sampling_steps=100),
    "v": DiffusionConfig("cosine", "v", learned_variance=False, sampler="dpm", sampling_steps=25),
    "x0": DiffusionConfig("cosine", "x0", learned_variance=False, sampler="dpm", sampling_steps=25),
}
PICTURES = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/cpu")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--json")
    given = parser.parse_args()
    checker = load_model("checker", Path(given.run) / "checker")
    scenes = sample_scenes(PICTURES, 77, held_out=True)
    rng = np.random.default_rng(5)
    texts = [caption(scene, "full", rng) for scene in scenes]
    figures = {}
    for name, diffusion in OBJECTIVES.items():
        run = Run(replace(CPU, decoder=replace(CPU.decoder, diffusion=diffusion)), Path(given.run), torch.device("cpu"))
        settings = replace(CPU.training["decoder"], steps=given.steps, checkpoint_every=given.steps)
        settings, model, batch, loss, _ = prepare("decoder", run, settings)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            model = fit(model, batch, loss, settings, Path(folder), name=name, model_config=asdict(run.preset.decoder))
        took = time.perf_counter() - start
        with torch.no_grad():
            z_i = LatentScale.for_dim(run.preset.decoder.embedding_dim).scale(run.clip.encode_image(to_tensor(render(scenes, run.preset.clip.image_size))))
        tokens, mask = trim(run.world.tokenizer(texts, run.preset.clip.context_length)[0])
        drawn = sample_decoder(model, make_schedule("cosine"), z_i, tokens, mask, range(PICTURES), guidance=2.0)
        right = accuracy([compare(parse(text), scene) for text, scene in zip(texts, checker.read(drawn))])
        figures[name] = {"training seconds": took, "network calls": diffusion.sampling_steps, **right}
        print(name, {key: round(value, 3) for key, value in figures[name].items()}, flush=True)
    if given.json:
        Path(given.json).write_text(json.dumps({"steps": given.steps, "pictures": PICTURES, "objectives": figures}, indent=1))


if __name__ == "__main__":
    main()
