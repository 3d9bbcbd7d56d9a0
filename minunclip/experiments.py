"""The paper's experiments on trained weights, each a function that returns its table.

Paper: section 3 (inversion, variations, text diffs), section 4 (typographic attack, principal components), section 5 (the importance of the
prior, Fig. 8; the comparison with GLIDE and DALL-E, Tab. 2; diversity against fidelity, Figs 9 to 11).
Where people judged in the paper, the caption checker counts here; its own error stands in the report of `minunclip evaluate`.
"""

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from minunclip.baselines.dalle import sample_dalle
from minunclip.data.captions import caption, compare, parse
from minunclip.data.render import render
from minunclip.data.scenes import COLOURS, SHAPES, TEXTURES, Scene, edit, sample_scenes
from minunclip.data.world import HELD_OUT_SEED, to_tensor
from minunclip.diffusion import make_schedule
from minunclip.evaluation import accuracy, diversity, frechet_distance, held_out_captions, precision_recall
from minunclip.manipulations import reconstruct, text_diff, variations
from minunclip.models.autoregressive_prior import fit_pca
from minunclip.models.clip import zero_shot
from minunclip.models.decoder import sample_decoder
from minunclip.pipeline import GUIDANCE, PriorName, UnCLIP

Table = dict[str, dict[str, float]]  # by row, then by column
BATCH = 50  # pictures that are drawn at once
RERANKED = 4  # candidates of DALL-E, of which CLIP keeps one; the source: 512
CHANGED = {"colour": tuple(COLOURS), "shape": SHAPES, "texture": TEXTURES}  # what a text diff may ask for


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB (B,) of pictures (B, 3, S, S) in [-1, 1]: 10 log10 of 1 / mean square error, in [0, 1]."""
    error = reduce(((images.clamp(-1, 1) - truth) / 2) ** 2, "b c h w -> b", "mean")
    return -10 * torch.log10(error)


def single_things(count: int, seed: int) -> list[Scene]:
    """Held-out scenes of one thing and no word."""
    scenes = sample_scenes(6 * count + 60, seed, held_out=True)
    return [scene for scene in scenes if len(scene.things) == 1 and scene.word is None][:count]


def _small(model: UnCLIP, scenes: Sequence[Scene]) -> Tensor:
    return to_tensor(render(list(scenes), model.sizes[0]))


def _right(model: UnCLIP, images: Tensor, texts: Sequence[str]) -> dict[str, float]:
    seen = model.models["checker"].read(images)
    return accuracy([compare(parse(text), scene) for text, scene in zip(texts, seen)])


def inversion(model: UnCLIP, count: int = 100, steps: Sequence[int] = (10, 25, 50, 100, 250), seed: int = 1) -> Table:
    """Section 3: how well pictures come back from (z_i, x_T), by the number of DDIM steps."""
    images = _small(model, sample_scenes(count, seed, held_out=True))
    return {str(n): {"PSNR": float(psnr(reconstruct(model, images, n), images).mean())} for n in steps}


def varying(model: UnCLIP, count: int = 50, etas: Sequence[float] = (0.0, 0.25, 0.5, 1.0), copies: int = 4, steps: int = 100, seed: int = 2) -> Table:
    """Section 3.1: of variations by eta, what stays (attributes of the original that the checker finds again) and how far pixels move."""
    scenes = sample_scenes(count, seed, held_out=True)
    rng = np.random.default_rng(seed)
    texts = [text for scene in scenes for text in [caption(scene, "full", rng)] * copies]
    images, table = _small(model, scenes), {}
    for eta in etas:
        varied = variations(model, images, copies, eta, steps=steps)
        moved = (varied - images[:, None]).abs().mean() / 2
        table[f"eta {eta:g}"] = {**_right(model, rearrange(varied, "b n c h w -> (b n) c h w"), texts), "pixel change": float(moved)}
    return table


def turning(model: UnCLIP, count: int = 200, shares: Sequence[float] = (0.0, 0.25, 0.5), steps: int = 100, seed: int = 3) -> Table:
    """Section 3.3: how often the attribute that a text diff asks for flips, and how often all the others stay."""
    scenes, rng = single_things(count, seed), np.random.default_rng(seed)
    names = [tuple(CHANGED)[i % len(CHANGED)] for i in range(len(scenes))]
    wanted = []
    for scene, name in zip(scenes, names):
        others = [value for value in CHANGED[name] if value != getattr(scene.things[0], name)]
        wanted.append(edit(scene, **{name: others[rng.integers(len(others))]}))
    # the same seed words both captions alike, so that they differ in what is asked for alone
    before = [caption(scene, "full", np.random.default_rng([seed, i])) for i, scene in enumerate(scenes)]
    after = [caption(scene, "full", np.random.default_rng([seed, i])) for i, scene in enumerate(wanted)]
    turned = text_diff(model, _small(model, scenes), before, after, list(shares), steps)
    table = {}
    for k, share in enumerate(shares):
        reports = [compare(parse(text), scene) for text, scene in zip(after, model.models["checker"].read(turned[:, k]))]
        flipped = [report.right.get(name, 0) == report.asked[name] for report, name in zip(reports, names)]
        kept = [all(report.right.get(a, 0) == n for a, n in report.asked.items() if a != name) for report, name in zip(reports, names)]
        table[f"theta {share:g}"] = {"flipped": float(np.mean(flipped)), "others kept": float(np.mean(kept)), "both": float(np.mean(np.array(flipped) & kept))}
    return table


def typographic(model: UnCLIP, count: int = 200, seed: int = 4) -> Table:
    """Section 4: zero-shot accuracy for the shape of a thing: with nothing, its own name, and another shape's name written on it."""
    clip = model.models["clip"]
    scenes = [edit(scene, size="large", x=0.5, y=0.5, radius=0.225) for scene in single_things(count, seed)]
    rng = np.random.default_rng(seed)
    truth = [SHAPES.index(scene.things[0].shape) for scene in scenes]
    lies = [int(rng.choice([k for k in range(len(SHAPES)) if k != shape])) for shape in truth]
    classes = model.read([f"a {shape}" for shape in SHAPES]).z_t

    def answers(words: list[str | None]) -> np.ndarray:
        written = [Scene(scene.things, scene.background, word=word, word_on_thing=word is not None) for scene, word in zip(scenes, words)]
        z_i = model.embed(to_tensor(render(written, clip.config.image_size)))
        return zero_shot(z_i, classes, clip.scale()).argmax(dim=1).cpu().numpy()

    cases: dict[str, list[str | None]] = {
        "no word": [None] * len(scenes),
        "its own word": [SHAPES[k] for k in truth],
        "another shape's word": [SHAPES[k] for k in lies],
    }
    return {
        name: {"shape seen": float(np.mean(answers(words) == truth)), "word believed": float(np.mean(answers(words) == lies))} for name, words in cases.items()
    }


def principal_components(model: UnCLIP, count: int = 100, dims: Sequence[int] = (0, 2, 4, 8, 16, 32, 64, 128), seed: int = 5) -> Table:
    """Section 4 and Fig. 7: what the decoder draws, from fixed noise, of z_i cut down to its first principal components."""
    side = model.models["clip"].config.image_size
    scenes, rng = sample_scenes(count, seed, held_out=True), np.random.default_rng(seed)
    texts = [caption(scene, "full", rng) for scene in scenes]
    z_i = model.embed(to_tensor(render(scenes, side)))
    training = [model.embed(to_tensor(render(sample_scenes(250, seed + 10 + k), side))) for k in range(8)]
    pca = fit_pca(torch.cat(training).cpu(), z_i.shape[1], tolerance=0.0)
    table = {}
    for n in [n for n in dims if n <= z_i.shape[1]]:
        cut = F.normalize(pca.reconstruct(pca.project(z_i.cpu())[:, :n]), dim=1).to(z_i)
        images = model.decode(cut, None, range(count))
        table[f"{n} components"] = {**_right(model, images, texts), "cosine": float((cut * z_i).sum(dim=1).mean())}
    return table


def importance_of_the_prior(model: UnCLIP, count: int = 200, copies: int = 2, seed: int = 6) -> Table:
    """Fig. 8: what the decoder is given in the place of z_i. "nothing" is the caption alone; "true z_i" is the ceiling.

    Diversity is the mean cosine distance, in CLIP's space, of `copies` pictures of one caption.
    """
    pairs = held_out_captions(count, seed)
    scenes, texts = [scene for scene, _ in pairs for _ in range(copies)], [text for _, text in pairs for _ in range(copies)]
    text, side = model.read(texts), model.models["clip"].config.image_size
    seeds = range(len(texts))
    given: dict[str, Tensor | None] = {"nothing": None, "z_t": text.z_t, "diffusion prior": model.draw_embeddings(text, "diffusion", seeds)[0]}
    if "ar-prior" in model.models:
        given["autoregressive prior"] = model.draw_embeddings(text, "autoregressive", seeds)[0]
    given["true z_i"] = model.embed(to_tensor(render(scenes, side)))
    real = model.embed(to_tensor(render(sample_scenes(len(texts), seed + 1, held_out=True), side)))
    table = {}
    for name, z_i in given.items():
        images = model.decode(z_i, text, seeds)
        seen = model.embed(images)
        spread = diversity(rearrange(seen, "(b n) d -> b n d", n=copies))
        table[name] = {**_right(model, images, texts), "FID": frechet_distance(real, seen), "diversity": spread}
    return table


Draw = Callable[[Sequence[str], Sequence[int], float], Tensor]  # captions, seeds, guidance to small pictures (B, 3, S, S) in [-1, 1]


def systems(model: UnCLIP) -> dict[str, Draw]:
    """What draws pictures from captions, by name: unCLIP with each prior, and the baselines that are among the weights."""
    side = model.sizes[0]

    def unclip(prior: PriorName) -> Draw:
        return lambda texts, seeds, guidance: to_tensor(model.generate(texts, prior, seeds, side, guidance).pictures[side])

    def glide(texts: Sequence[str], seeds: Sequence[int], guidance: float) -> Tensor:
        network, text = model.models["glide"], model.read(texts)
        schedule = make_schedule(network.config.diffusion.schedule, network.config.diffusion.steps)
        return sample_decoder(network, schedule, None, text.tokens, text.mask, seeds, guidance=guidance)

    def dalle(texts: Sequence[str], seeds: Sequence[int], guidance: float) -> Tensor:
        """RERANKED candidates a caption, of which CLIP keeps one; there is no guidance."""
        text = model.read(texts)
        numbers = [RERANKED * seed + k for seed in seeds for k in range(RERANKED)]
        tokens, mask = (x.repeat_interleave(RERANKED, dim=0) for x in (text.tokens, text.mask))
        images = rearrange(sample_dalle(model.models["dalle"], model.models["dalle-vae"], tokens, mask, numbers), "(b n) c h w -> b n c h w", n=RERANKED)
        z_i = rearrange(model.embed(rearrange(images, "b n c h w -> (b n) c h w")), "(b n) d -> b n d", n=RERANKED)
        best = (z_i * text.z_t[:, None]).sum(dim=2).argmax(dim=1)
        return images[torch.arange(len(images)), best.to(images.device)]

    there: dict[str, Draw] = {"unCLIP, diffusion prior": unclip("diffusion")}
    if "ar-prior" in model.models:
        there["unCLIP, AR prior"] = unclip("autoregressive")
    if "glide" in model.models:
        there["GLIDE"] = glide
    if "dalle" in model.models:
        there["DALL-E"] = dalle
    return there


PARTS = {
    "unCLIP, diffusion prior": ("clip", "prior", "decoder"),
    "unCLIP, AR prior": ("clip", "ar-prior", "decoder"),
    "GLIDE": ("glide",),
    "DALL-E": ("clip", "dalle-vae", "dalle"),
}


def compared(model: UnCLIP, count: int = 300, seeds: Sequence[int] = (0, 1, 2)) -> Table:
    """Tab. 2 in small: each system on the same held-out captions, drawn with each seed; the mean, and under "± ..." the spread over the seeds.

    Fréchet distances are to drawn scenes, in CLIP's space and in the checker's, which was trained without CLIP. "floor" is a second set of
    drawn scenes in the place of a system. Seconds are those of a picture at the decoder's size.
    """
    pairs = held_out_captions(count, HELD_OUT_SEED + 7)
    texts = [text for _, text in pairs]
    z_t, checker = model.read(texts).z_t, model.models["checker"]
    real = _small(model, sample_scenes(count, HELD_OUT_SEED + 8, held_out=True))
    again = _small(model, sample_scenes(count, HELD_OUT_SEED + 9, held_out=True))
    spaces: dict[str, Callable[[Tensor], Tensor]] = {"FID": model.embed, "FID of the checker": checker.features}
    truth = {name: space(real) for name, space in spaces.items()}
    table = {}
    for name, draw in systems(model).items():
        runs = []
        for seed in seeds:
            start = time.perf_counter()
            images = torch.cat(
                [draw(texts[i : i + BATCH], range(seed * count + i, seed * count + i + len(texts[i : i + BATCH])), GUIDANCE) for i in range(0, count, BATCH)]
            )
            took = time.perf_counter() - start
            z_i = model.embed(images)
            precision, recall = precision_recall(truth["FID"], z_i)
            run = {key: frechet_distance(truth[key], space(images)) for key, space in spaces.items()} | {"precision": precision, "recall": recall}
            run |= {"all_right": _right(model, images, texts)["all_right"], "CLIP score": float((z_i * z_t).sum(dim=1).mean()), "seconds": took / count}
            runs.append(run)
        row = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
        row |= {f"± {key}": float(np.std([run[key] for run in runs])) for key in runs[0] if key != "seconds"}
        row["million parameters"] = sum(p.numel() for part in PARTS[name] for p in model.models[part].parameters()) / 1e6
        table[name] = row
    table["floor"] = {key: frechet_distance(truth[key], space(again)) for key, space in spaces.items()}
    return table


def guidance_sweep(model: UnCLIP, count: int = 60, copies: int = 4, scales: Sequence[float] = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0), seed: int = 8) -> Table:
    """Section 5.3: what guidance does to fidelity and to diversity, of unCLIP and of GLIDE: `copies` pictures of each caption at each scale."""
    pairs = held_out_captions(count, seed)
    texts = [text for _, text in pairs for _ in range(copies)]
    real = model.embed(_small(model, sample_scenes(len(texts), seed + 1, held_out=True)))
    table = {}
    for name, draw in systems(model).items():
        for scale in scales if name in ("unCLIP, diffusion prior", "GLIDE") else ():
            images = draw(texts, range(len(texts)), scale)
            seen = model.embed(images)
            row = {"all_right": _right(model, images, texts)["all_right"], "FID": frechet_distance(real, seen)}
            row |= {"diversity": diversity(rearrange(seen, "(b n) d -> b n d", n=copies)), "recall": precision_recall(real, seen)[1]}
            table[f"{name}, guidance {scale:g}"] = row
    return table


EXPERIMENTS: dict[str, Callable[[UnCLIP], Table]] = {
    function.__name__.replace("_", "-"): function
    for function in (inversion, varying, turning, typographic, principal_components, importance_of_the_prior, compared, guidance_sweep)
}


def as_markdown(table: Table) -> str:
    """A table with one row a case; numbers with three digits."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    cells = ["" if math.isnan(row.get(column, math.nan)) else f"{row[column]:.3f}" for row in table.values() for column in columns]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    return "\n".join(lines + [f"| {name} | " + " | ".join(cells[i * len(columns) :][: len(columns)]) + " |" for i, name in enumerate(table)]) + "\n"
