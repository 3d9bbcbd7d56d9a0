"""The paper's experiments on trained weights, each a function that returns its table.

Paper: section 3 (inversion, variations, text diffs), section 4 (typographic attack, principal components), section 5 (the importance of the
prior, Fig. 8; the comparison with GLIDE and DALL-E, Tabs 1 and 2; diversity against fidelity, Figs 9 to 11; quality, Fig. 13).
Where people judged in the paper, the caption checker counts here; its own error stands in the report of `minunclip evaluate`.
"""

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from minunclip.aesthetics import fit_probe, simulated_ratings, taste
from minunclip.baselines.dalle import sample_dalle
from minunclip.baselines.glide import sample_glide
from minunclip.config import BASELINES
from minunclip.data.captions import SYNONYMS, caption, compare, parse
from minunclip.data.render import render
from minunclip.data.scenes import COLOURS, SHAPES, TEXTURES, Scene, edit, sample_scenes
from minunclip.data.unsaid import another, unsaid
from minunclip.data.world import HELD_OUT_SEED, to_tensor
from minunclip.diffusion import SamplerName, schedule_of
from minunclip.evaluation import accuracy, diversity, frechet_distance, held_out_captions, precision_recall
from minunclip.manipulations import interpolate, text_diff, variations
from minunclip.models.autoregressive_prior import fit_pca
from minunclip.models.clip import zero_shot
from minunclip.models.diffusion_prior import prior_errors, sample_prior
from minunclip.pipeline import GUIDANCE, PRIOR_GUIDANCE, UPSAMPLERS, PriorName, UnCLIP

Table = dict[str, dict[str, float]]  # by row, then by column
BATCH = 50  # pictures that are drawn at once
RERANKED = 4  # candidates of DALL-E, of which CLIP keeps one; the source: 512
SAID = ("shape", "colour", "texture", "size")
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


def _floors(model: UnCLIP, count: int, copies: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """z_i of count * copies drawn scenes, to which `copies` pictures of `count` captions are compared, and of other scenes in the place of pictures: as many
    that all differ, and `copies` near-copies of `count`. A system whose pictures of a caption are alike in part has its floor between the two.
    """
    rng, number = np.random.default_rng(seed), count * copies
    real, different = (sample_scenes(number, seed + k, held_out=True) for k in (1, 2))
    floors = {"floor": different, "floor of near-copies": [another(scene, rng) for scene in different[:count] for _ in range(copies)]}
    return model.embed(_small(model, real)), {name: model.embed(_small(model, scenes)) for name, scenes in floors.items()}


def seeds_apart(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Seeds for the prior and for the decoder, others for each `seed`: z_i must say nothing of the noise that the decoder starts from."""
    numbers = range(seed * count, (seed + 1) * count)
    return [2 * number for number in numbers], [2 * number + 1 for number in numbers]


def _right(model: UnCLIP, images: Tensor, texts: Sequence[str]) -> dict[str, float]:
    seen = model.models["checker"].read(images)
    return accuracy([compare(parse(text), scene) for text, scene in zip(texts, seen)])


def inversion(model: UnCLIP, count: int = 100, steps: Sequence[int] = (10, 25, 50, 100, 250), seed: int = 1) -> Table:
    """Section 3: how well pictures come back from (z_i, x_T), by the number of DDIM steps: by undoing the inversion step by step, which stops where
    pictures enter it, and by drawing them to the end with eta = 0, as variations and edits do. Unit noise has a length of 55.4 here.
    """
    images, table = _small(model, sample_scenes(count, seed, held_out=True)), {}
    for n in steps:
        z_i, x_T = model.invert(images, n)
        undone, drawn = model.revert(z_i, x_T, n).cpu(), model.redraw(z_i, x_T, range(count), n).cpu()
        table[f"steps {n}"] = {name: float(psnr(back, images).mean()) for name, back in (("PSNR undone", undone), ("PSNR drawn", drawn))}
        table[f"steps {n}"]["length of x_T"] = float(x_T.flatten(1).norm(dim=1).mean())
    return table


def _same_but_unsaid(found: Scene, scene: Scene) -> bool:
    """Whether a picture still shows the one thing of a scene, on its background, in all that captions can say of it."""
    return len(found.things) == 1 and found.background == scene.background and all(getattr(found.things[0], a) == getattr(scene.things[0], a) for a in SAID)


def varying(model: UnCLIP, count: int = 50, etas: Sequence[float] = (0.0, 0.25, 0.5, 1.0), copies: int = 4, steps: int = 100, seed: int = 2) -> Table:
    """Section 3.1: of variations of lone things by eta, what stays (attributes of the original that the checker finds again), and what varies.

    How far pixels change, and, of those that are still the same thing, how far it has moved (shares of the side), turned (degrees) and changed its shade
    (of 255): what captions never say, and z_i need not hold. The last row is the world: another scene that the same captions fit.
    """
    scenes, rng = single_things(count, seed), np.random.default_rng(seed)
    copied = [scene for scene in scenes for _ in range(copies)]
    texts = [text for scene in scenes for text in [caption(scene, "full", rng)] * copies]
    images, shown = _small(model, scenes), {}
    for eta in etas:
        shown[f"eta {eta:g}"] = rearrange(variations(model, images, copies, eta, seed * count * copies, steps), "b n c h w -> (b n) c h w")
    shown["another scene"] = _small(model, [another(scene, rng) for scene in copied]).to(images)
    things = [scene.things[0] for scene in copied]
    truth = torch.tensor([[thing.x, thing.y, thing.rotation, *thing.shade] for thing in things])
    table = {}
    for name, varied in shown.items():
        seen = model.models["checker"].read(varied)
        same = torch.tensor([_same_but_unsaid(found, scene) for found, scene in zip(seen, copied)])
        change = torch.where(same[:, None], (unsaid(varied, copied) - truth).abs(), math.nan)
        row = _right(model, varied, texts) | {"pixel change": float((varied.cpu() - images.cpu().repeat_interleave(copies, dim=0)).abs().mean() / 2)}
        row["one thing"] = float(np.mean([len(found.things) == 1 for found in seen]))
        row |= {"moved": float(change[:, :2].norm(dim=1).nanmean()), "turned": math.degrees(float(change[:, 2].nanmean()))}
        row["shade"] = float(change[:, 3:].nanmean())  # nan, like these two, where none is still the same
        table[name] = row
    return table


def reworded(text: str, before: str, after: str) -> str:
    """A full caption of one thing, with another of the world's words in the place of the first that says `before`."""
    words = text.split()
    words[next(i for i, word in enumerate(words) if word in SYNONYMS[before])] = after
    return " ".join(words)


def interpolating(model: UnCLIP, count: int = 50, shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0), steps: int = 100, seed: int = 16) -> Table:
    """Section 3.2: on the way from one lone thing to another, how much of shape, colour and texture is still the first's, is already the second's, or
    neither's, and how far pixels change from one picture to the next: once with x_T going along, once with the same noise all the way.
    """
    things = single_things(8 * count, seed)
    pairs = [(a, b) for a, b in zip(things[::2], things[1::2]) if all(getattr(a.things[0], name) != getattr(b.things[0], name) for name in CHANGED)][:count]
    start, end = (_small(model, [pair[k] for pair in pairs]) for k in range(2))
    named = [[np.array([getattr(pair[k].things[0], name) for name in CHANGED], dtype=object) for pair in pairs] for k in range(2)]
    table = {}
    for noise, noise_seed in (("both latents", None), ("one noise", seed)):
        frames = interpolate(model, start, end, list(shares), noise_seed, steps)
        for k, share in enumerate(shares):
            seen = [found.things for found in model.models["checker"].read(frames[:, k])]
            shown = [[getattr(found[0], name) if len(found) == 1 else None for name in CHANGED] for found in seen]
            first, second = (float(np.mean([np.array(row, dtype=object) == whose for row, whose in zip(shown, values)])) for values in named)
            row = {"the first's": first, "the second's": second, "neither's": 1 - first - second}
            row |= {} if k == 0 else {"step": float((frames[:, k] - frames[:, k - 1]).abs().mean() / 2)}
            table[f"{noise}, {share:g} of the way"] = row
    return table


def turning(model: UnCLIP, count: int = 200, shares: Sequence[float] = (0.0, 0.25, 0.5), steps: int = 100, seed: int = 3) -> Table:
    """Section 3.3: how often the attribute that a text diff asks for flips, and how often all the others stay."""
    scenes, rng = single_things(count, seed), np.random.default_rng(seed)
    names = [tuple(CHANGED)[i % len(CHANGED)] for i in range(len(scenes))]
    wanted = []
    for scene, name in zip(scenes, names):
        others = [value for value in CHANGED[name] if value != getattr(scene.things[0], name)]
        wanted.append(edit(scene, **{name: others[rng.integers(len(others))]}))
    before = [caption(scene, "full", np.random.default_rng([seed, i])) for i, scene in enumerate(scenes)]
    values = [[getattr(scene.things[0], name) for scene in (old, new)] for old, new, name in zip(scenes, wanted, names)]
    after = [reworded(text, *pair) for text, pair in zip(before, values)]
    turned = text_diff(model, _small(model, scenes), before, after, list(shares), steps)
    table = {}
    for k, share in enumerate(shares):
        seen = model.models["checker"].read(turned[:, k])
        reports = [compare(parse(text), scene) for text, scene in zip(after, seen)]
        flipped = [report.right.get(name, 0) == report.asked[name] for report, name in zip(reports, names)]
        alone = [len(scene.things) == 1 for scene in seen]  # no caption of one thing says that there is no other
        kept = [one and all(report.right.get(a, 0) == n for a, n in report.asked.items() if a != name) for one, report, name in zip(alone, reports, names)]
        table[f"theta {share:g}"] = {"flipped": float(np.mean(flipped)), "others kept": float(np.mean(kept)), "both": float(np.mean(np.array(flipped) & kept))}
    return table


def written_on(count: int, seed: int) -> tuple[dict[str, list[Scene]], dict[str, list[int]]]:
    """Lone things with nothing, with their own name, and with another shape's name written on them; and, as numbers of SHAPES, the shapes ("shape") and
    those others ("word").
    """
    scenes = [edit(scene, size="large", x=0.5, y=0.5, radius=0.225) for scene in single_things(count, seed)]
    rng = np.random.default_rng(seed)
    shapes = [SHAPES.index(scene.things[0].shape) for scene in scenes]
    lies = [int(rng.choice([k for k in range(len(SHAPES)) if k != shape])) for shape in shapes]
    words: dict[str, list[str | None]] = {
        "no word": [None] * len(scenes),
        "its own word": [SHAPES[k] for k in shapes],
        "another shape's word": [SHAPES[k] for k in lies],
    }
    cases = {name: [replace(scene, word=word, word_on_thing=word is not None) for scene, word in zip(scenes, row)] for name, row in words.items()}
    return cases, {"shape": shapes, "word": lies}


def counted(answers: Sequence[int | None], wanted: dict[str, list[int]], verb: str) -> dict[str, float]:
    """How often an answer is the thing's shape, and how often the other one, that is written on it in one of the cases."""
    return {f"{name} {verb}": float(np.mean([answer == k for answer, k in zip(answers, numbers)])) for name, numbers in wanted.items()}


def believed(model: UnCLIP, scenes: Sequence[Scene], z_i: Tensor, wanted: dict[str, list[int]]) -> dict[str, float]:
    """Zero-shot: of which shape CLIP takes pictures with these z_i to be, by "a circle", "a square" and so on; and, where words are written, how often it
    finds, of eight captions that differ in the word alone ("a circle with the word star on it"), that of the word, and how often that of the thing's name,
    which needs no letters. Who cannot read finds another word in one of seven of the rest.
    """
    answers = zero_shot(z_i, model.read([f"a {shape}" for shape in SHAPES]).z_t, model.models["clip"].scale()).argmax(dim=1).tolist()
    if scenes[0].word is None:
        return counted(answers, wanted, "believed")
    captions = {shape: model.read([f"a {shape} with the word {word} on it" for word in SHAPES]).z_t for shape in SHAPES}
    read = [SHAPES[int((captions[scene.things[0].shape] @ z).argmax())] for scene, z in zip(scenes, z_i)]
    found: dict[str, list[str | None]] = {"word read": [scene.word for scene in scenes], "name read": [scene.things[0].shape for scene in scenes]}
    return counted(answers, wanted, "believed") | {name: float(np.mean([word == right for word, right in zip(read, words)])) for name, words in found.items()}


def typographic(model: UnCLIP, count: int = 200, seed: int = 4) -> Table:
    """Section 4: zero-shot accuracy for the shape of a thing, with nothing, its own name, and another shape's name written on it; whether CLIP can read
    what is written; and which shape the decoder draws from such a picture's z_i alone.
    """
    cases, wanted = written_on(count, seed)
    table = {}
    for name, scenes in cases.items():
        z_i = model.embed(to_tensor(render(scenes, model.models["clip"].config.image_size)))
        drawn = [scene.things for scene in model.models["checker"].read(model.decode(z_i, None, seeds_apart(len(scenes), seed)[1]))]
        shapes = [SHAPES.index(things[0].shape) if len(things) == 1 else None for things in drawn]
        table[name] = believed(model, scenes, z_i, wanted) | counted(shapes, wanted, "drawn")
    return table


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
        images = model.decode(cut, None, seeds_apart(count, seed)[1])
        table[f"{n} components"] = {**_right(model, images, texts), "cosine": float((cut * z_i).sum(dim=1).mean())}
    return table


def importance_of_the_prior(model: UnCLIP, count: int = 200, copies: int = 2, seed: int = 6) -> Table:
    """Fig. 8: what the decoder is given in the place of z_i. "nothing" is the caption alone; "true z_i" is the ceiling; for the
    floors see `_floors`.

    Diversity is the mean cosine distance, in CLIP's space, of `copies` pictures of one caption.
    """
    pairs = held_out_captions(count, seed)
    scenes, texts = [scene for scene, _ in pairs for _ in range(copies)], [text for _, text in pairs for _ in range(copies)]
    text, side = model.read(texts), model.models["clip"].config.image_size
    prior_seeds, decoder_seeds = seeds_apart(len(texts), seed)
    given: dict[str, Tensor | None] = {"nothing": None, "z_t": text.z_t, "diffusion prior": model.draw_embeddings(text, "diffusion", prior_seeds)[0]}
    if "ar-prior" in model.models:
        given["autoregressive prior"] = model.draw_embeddings(text, "autoregressive", prior_seeds)[0]
    given["true z_i"] = model.embed(to_tensor(render(scenes, side)))
    real, floors = _floors(model, count, copies, seed)
    table = {}
    for name, z_i in given.items():
        images = model.decode(z_i, text, decoder_seeds)
        seen = model.embed(images)
        spread = diversity(rearrange(seen, "(b n) d -> b n d", n=copies))
        table[name] = {**_right(model, images, texts), "FID": frechet_distance(real, seen), "diversity": spread}
    return table | {name: {"FID": frechet_distance(real, scenes)} for name, scenes in floors.items()}


def _answers(model: UnCLIP, count: int, seed: int, cases: dict[str, dict[str, Any]]) -> Table:
    """The prior's z_i with the options of each case: beside the true ones, beside a second draw for the same caption, and as the decoder's pictures."""
    pairs, prior = held_out_captions(count, HELD_OUT_SEED + seed), model.models["prior"]
    texts = [text for _, text in pairs]
    text, schedule = model.read(texts), schedule_of(prior.config.diffusion)
    truth = model.embed(to_tensor(render([scene for scene, _ in pairs], model.models["clip"].config.image_size)))
    first, decoder_seeds = seeds_apart(count, seed)
    table = {}
    for name, options in cases.items():
        draws = (first, [2**31 + number for number in first])
        z_i, again = (sample_prior(prior, schedule, text.encoded, text.mask, text.z_t, seeds, **options)[0] for seeds in draws)
        row = {"cosine": float((z_i * truth).sum(dim=1).mean()), "FID of z_i": frechet_distance(truth, z_i)}
        row["diversity"] = diversity(torch.stack([z_i, again], dim=1))
        right = _right(model, model.decode(z_i, text, decoder_seeds), texts)
        table[name] = row | {key: right[key] for key in ("shape", "all_right")}
    return table


def candidates(model: UnCLIP, count: int = 200, numbers: Sequence[int] = (1, 2, 4, 8), seed: int = 14) -> Table:
    """Section 2.2: how many embeddings the prior draws, of which the one with the highest z_i . z_t is kept; the paper: two."""
    return _answers(model, count, seed, {f"best of {number}": {"candidates": number, "guidance": PRIOR_GUIDANCE} for number in numbers})


def prior_guidance(model: UnCLIP, count: int = 200, scales: Sequence[float] = (1.0, 1.5, 2.0, 3.0, 5.0), seed: int = 15) -> Table:
    """Section 2.2: the prior's own guidance, for which it was trained without its caption in 10 % of the examples; the decoder's stays what it is."""
    return _answers(model, count, seed, {f"guidance {scale:g}": {"guidance": scale} for scale in scales})


Draw = Callable[[Sequence[str], Sequence[int], float], Tensor]  # captions, seeds, guidance to small pictures (B, 3, S, S) in [-1, 1]


def _unclip(model: UnCLIP, prior: PriorName, of_prior: float = PRIOR_GUIDANCE) -> Draw:
    side = model.sizes[0]
    return lambda texts, seeds, guidance: to_tensor(model.generate(texts, prior, seeds, side, guidance, of_prior).pictures[side])


def systems(model: UnCLIP) -> dict[str, Draw]:
    """What draws pictures from captions, by name: unCLIP with each prior, and the baselines that are among the weights."""

    def glide(texts: Sequence[str], seeds: Sequence[int], guidance: float) -> Tensor:
        text = model.read(texts)
        return sample_glide(model.models["glide"], text.tokens, text.mask, seeds, guidance)

    def dalle(texts: Sequence[str], seeds: Sequence[int], guidance: float) -> Tensor:
        """RERANKED candidates a caption, of which CLIP keeps one; there is no guidance."""
        text = model.read(texts)
        numbers = [RERANKED * seed + k for seed in seeds for k in range(RERANKED)]
        tokens, mask = (x.repeat_interleave(RERANKED, dim=0) for x in (text.tokens, text.mask))
        images = rearrange(sample_dalle(model.models["dalle"], model.models["dalle-vae"], tokens, mask, numbers), "(b n) c h w -> b n c h w", n=RERANKED)
        z_i = rearrange(model.embed(rearrange(images, "b n c h w -> (b n) c h w")), "(b n) d -> b n d", n=RERANKED)
        best = (z_i * text.z_t[:, None]).sum(dim=2).argmax(dim=1)
        return images[torch.arange(len(images)), best.to(images.device)]

    there: dict[str, Draw] = {"unCLIP, diffusion prior": _unclip(model, "diffusion")}
    if "ar-prior" in model.models:
        there["unCLIP, AR prior"] = _unclip(model, "autoregressive")
    if "glide" in model.models:
        there["GLIDE"] = glide
    if "dalle" in model.models:
        there["DALL-E"] = dalle
    return there


def guided(model: UnCLIP) -> dict[str, Draw]:
    """The systems whose guidance is swept; unCLIP once with its prior guided as ever, and once, as where the paper sweeps (section 5.5), unguided."""
    there = systems(model)
    both = {"unCLIP, diffusion prior": there["unCLIP, diffusion prior"], "unCLIP, prior unguided": _unclip(model, "diffusion", of_prior=1.0)}
    return both | ({"GLIDE": there["GLIDE"]} if "GLIDE" in there else {})


PARTS = {
    "unCLIP, diffusion prior": ("clip", "prior", "decoder"),
    "unCLIP, AR prior": ("clip", "ar-prior", "decoder"),
    "GLIDE": ("glide",),
    "DALL-E": ("clip", "dalle-vae", "dalle"),
}


def _drawn(draw: Draw, texts: Sequence[str], first_seed: int, guidance: float = GUIDANCE) -> Tensor:
    parts = [draw(texts[i : i + BATCH], range(first_seed + i, first_seed + min(i + BATCH, len(texts))), guidance) for i in range(0, len(texts), BATCH)]
    return torch.cat(parts)


def compared(model: UnCLIP, count: int = 300, seed: int = 7) -> Table:
    """Tab. 2 in small: each system on the same held-out captions.

    Fréchet distances are to drawn scenes, in CLIP's space and in the checker's, which was trained without CLIP. "floor" is a second set of
    drawn scenes in the place of a system; "through DALL-E's codes" are the captions' own scenes, as its discrete VAE gives them back.
    Seconds are those of a picture at the decoder's size.
    """
    pairs = held_out_captions(count, HELD_OUT_SEED + seed)
    texts = [text for _, text in pairs]
    real, again = (_small(model, sample_scenes(count, HELD_OUT_SEED + seed + k, held_out=True)) for k in (1, 2))
    spaces: dict[str, Callable[[Tensor], Tensor]] = {"FID": model.embed, "FID of the checker": model.models["checker"].features}
    truth, z_t = {name: space(real) for name, space in spaces.items()}, model.read(texts).z_t

    def figures(images: Tensor) -> dict[str, float]:
        z_i = model.embed(images)
        precision, recall = precision_recall(truth["FID"], z_i)
        row = {key: frechet_distance(truth[key], space(images)) for key, space in spaces.items()} | {"precision": precision, "recall": recall}
        return row | {"all_right": _right(model, images, texts)["all_right"], "CLIP score": float((z_i * z_t).sum(dim=1).mean())}

    table = {}
    for name, draw in systems(model).items():
        start = time.perf_counter()
        images = _drawn(draw, texts, seed * count)
        took = time.perf_counter() - start
        table[name] = figures(images) | {"seconds": took / count}
        table[name]["million parameters"] = sum(p.numel() for part in PARTS[name] for p in model.models[part].parameters()) / 1e6
    if "dalle-vae" in model.models:
        vae, images = model.models["dalle-vae"], _small(model, [scene for scene, _ in pairs]).to(model.device)
        with torch.no_grad():
            table["through DALL-E's codes"] = figures(vae.decode(vae.encode(images)).clamp(-1, 1))
    table["floor"] = {key: frechet_distance(truth[key], space(again)) for key, space in spaces.items()}
    return table


def judged(model: UnCLIP, count: int = 60, copies: int = 4, seed: int = 18) -> Table:
    """Tab. 1 in small: how often unCLIP with the diffusion prior is preferred to each other system, and to the captions' own scenes, by simulated raters.

    No person has judged; ties count half. Caption similarity: of two pictures that one wins which has more right of what the caption names. Diversity: of
    two grids of `copies` pictures the one whose all-right pictures lie further apart, on average, in the checker's space. What looks real is not asked,
    since no rule here knows it.
    """
    checker, (ours, *others) = model.models["checker"], systems(model).items()
    pairs = held_out_captions(count, HELD_OUT_SEED + seed)
    texts = [text for _, text in pairs for _ in range(copies)]

    def scores(images: Tensor) -> dict[str, Tensor]:
        reports = [compare(parse(text), scene) for text, scene in zip(texts, checker.read(images))]
        fitting = torch.tensor([sum(report.right.values()) / sum(report.asked.values()) for report in reports])
        right = rearrange(torch.tensor([report.all_right for report in reports]), "(b n) -> b n", n=copies)
        features = rearrange(checker.features(images).cpu(), "(b n) d -> b n d", n=copies)
        both = right[:, :, None] & right[:, None] & ~torch.eye(copies, dtype=torch.bool)
        varied = (torch.cdist(features, features) * both).sum(dim=(1, 2)) / both.sum(dim=(1, 2)).clamp(min=1)
        return {"caption similarity": fitting, "diversity": varied}

    def preferred(question: str, theirs: dict[str, Tensor]) -> float:
        return float(((mine[question] > theirs[question]) + (mine[question] == theirs[question]) / 2).mean())

    first_seed, table = seed * len(texts), {}
    mine = scores(_drawn(ours[1], texts, first_seed))
    for name, draw in others:
        theirs = scores(_drawn(draw, texts, first_seed))
        table[f"preferred to {name}"] = {question: preferred(question, theirs) for question in mine}
    drawn = scores(_small(model, [scene for scene, _ in pairs for _ in range(copies)]))
    return table | {"preferred to the scenes themselves": {"caption similarity": preferred("caption similarity", drawn)}}


def guidance_sweep(model: UnCLIP, count: int = 100, copies: int = 2, scales: Sequence[float] = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0), seed: int = 8) -> Table:
    """Section 5.3: what guidance does to fidelity and to diversity, of unCLIP and of GLIDE: `copies` pictures of each caption at each scale.

    The scale is the decoder's; the prior keeps its own, or has none. Recall is that of one picture a caption, since a picture's copies are its neighbours.
    """
    pairs = held_out_captions(count, seed)
    texts = [text for _, text in pairs for _ in range(copies)]
    real, floors = _floors(model, count, copies, seed)
    table = {}
    for name, draw in guided(model).items():
        for scale in scales:
            images = _drawn(draw, texts, seed * len(texts), scale)
            seen = model.embed(images)
            row = {"all_right": _right(model, images, texts)["all_right"], "FID": frechet_distance(real, seen)}
            row |= {"diversity": diversity(rearrange(seen, "(b n) d -> b n d", n=copies)), "recall": precision_recall(real[::copies], seen[::copies])[1]}
            table[f"{name}, guidance {scale:g}"] = row
    return table | {
        name: {"FID": frechet_distance(real, scenes), "recall": precision_recall(real[::copies], scenes[::copies])[1]} for name, scenes in floors.items()
    }


def samplers(model: UnCLIP, count: int = 100, steps: Sequence[int] = (4, 8, 16, 25, 64, 250), seed: int = 9) -> Table:
    """What each sampler makes of a number of steps: the prior's embeddings beside the true ones, and the decoder's pictures of the true ones.

    The decoder's Fréchet distance is to the same scenes, drawn exactly. Guided, it calls its network twice a step.
    "analytic" is the prior's sampler in the paper, with errors measured on other scenes.
    """
    pairs = held_out_captions(count, HELD_OUT_SEED + seed)
    scenes, texts = [scene for scene, _ in pairs], [text for _, text in pairs]
    text, prior, side = model.read(texts), model.models["prior"], model.models["clip"].config.image_size
    z_i = model.embed(to_tensor(render(scenes, side)))
    real = model.embed(_small(model, scenes))
    prior_seeds, decoder_seeds = seeds_apart(count, seed)
    other = held_out_captions(200, HELD_OUT_SEED + seed + 2)
    other_z_i, other_text = model.embed(to_tensor(render([scene for scene, _ in other], side))), model.read([words for _, words in other])
    schedule = schedule_of(prior.config.diffusion)
    table = {}
    for name in ("ancestral", "analytic", "ddim", "dpm"):
        for n in steps:
            errors = prior_errors(prior, schedule, other_z_i, other_text.encoded, other_text.mask, other_text.z_t, n) if name == "analytic" else None
            sampler: SamplerName = "ancestral" if name == "analytic" else name  # type: ignore[assignment]
            drawn = sample_prior(prior, schedule, text.encoded, text.mask, text.z_t, prior_seeds, n, candidates=1, sampler=sampler, errors=errors)[0]
            table[f"prior, {name}, {n}"] = {"network calls": n, "cosine": float((drawn * z_i).sum(dim=1).mean()), "FID": frechet_distance(z_i, drawn)}
    cases: list[tuple[str, SamplerName, float]] = [*((name, name, GUIDANCE) for name in get_args(SamplerName)), ("ddim unguided", "ddim", 1.0)]
    for label, sampler, scale in cases:
        for n in steps:
            images = model.decode(z_i, text, decoder_seeds, scale, steps=n, sampler=sampler)
            right = _right(model, images, texts)["all_right"]
            table[f"decoder, {label}, {n}"] = {
                "network calls": n if scale == 1 else 2 * n,
                "FID": frechet_distance(real, model.embed(images)),
                "all_right": right,
            }
    return table


def aesthetic(model: UnCLIP, count: int = 100, scales: Sequence[float] = (1.0, 2.0, 4.0, 8.0), seed: int = 10) -> Table:
    """Section 5.5: a linear probe of quality on z_i, trained on simulated ratings (see `aesthetics.taste`), and what guidance does to it."""
    side, rng = model.models["clip"].config.image_size, np.random.default_rng(seed)

    def rated(count: int, seed: int) -> tuple[Tensor, Tensor]:
        pictures = to_tensor(render(sample_scenes(count, seed), side))
        return model.embed(pictures).cpu(), simulated_ratings(pictures, rng)

    probe = fit_probe(*rated(15 * count, seed))
    z_i, ratings = rated(5 * count, seed + 1)
    table = {"the probe, on other pictures": {"correlation with the ratings": float(torch.corrcoef(torch.stack([probe(z_i), ratings]))[0, 1])}}
    pairs = held_out_captions(count, HELD_OUT_SEED + seed)
    texts, drawn = [text for _, text in pairs], _small(model, [scene for scene, _ in pairs])
    table["the scenes themselves"] = {"the probe's rating": float(probe(model.embed(drawn).cpu()).mean()), "the rule's own rating": float(taste(drawn).mean())}
    for name, draw in guided(model).items():
        for scale in scales:
            images = _drawn(draw, texts, seed * count, scale)
            liked = {"the probe's rating": float(probe(model.embed(images).cpu()).mean()), "the rule's own rating": float(taste(images).mean())}
            table[f"{name}, guidance {scale:g}"] = liked | {"all_right": _right(model, images, texts)["all_right"]}
    return table


EXPERIMENTS: dict[str, Callable[..., Table]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        inversion,
        varying,
        interpolating,
        turning,
        typographic,
        principal_components,
        importance_of_the_prior,
        candidates,
        prior_guidance,
        compared,
        judged,
        guidance_sweep,
        aesthetic,
        samplers,
    )
}
CURVES = {
    "inversion": "steps",
    "prior-guidance": "guidance",
    "guidance-sweep": "guidance",
    "aesthetic": "guidance",
    "samplers": "network calls",
    "race": "training seconds",
}


def unused(name: str) -> tuple[str, ...]:
    """Stages that an experiment does without, so that what it found holds when they are trained anew. All judge pictures of the decoder's size."""
    rivals = {"compared": BASELINES, "judged": BASELINES, "guidance-sweep": ("glide",), "aesthetic": ("glide",)}
    return (*UPSAMPLERS, *(stage for stage in BASELINES if stage not in rivals.get(name, ())))


def with_seed(function: Callable[..., Table], model: UnCLIP, number: int) -> Table:
    """An experiment's table of its own seed (`number` 0) or of one further on: other captions, scenes and noise."""
    return function(model, seed=inspect.signature(function).parameters["seed"].default + 100 * number)


def over_seeds(tables: Sequence[Table]) -> Table:
    """The mean of an experiment's tables of several seeds; beside each figure, under "± " and its name, the standard deviation. One stays as it is."""
    if len(tables) == 1:
        return tables[0]
    mean: Table = {}
    for name, row in tables[0].items():
        values = {key: [table[name][key] for table in tables] for key in row}
        mean[name] = {key: float(np.mean(x)) for key, x in values.items()} | {f"± {key}": float(np.std(x, ddof=1)) for key, x in values.items()}
    return mean


def as_markdown(table: Table) -> str:
    """A table with one row a case; numbers with three digits, their spread over seeds behind them."""
    columns = [name for name in dict.fromkeys(column for row in table.values() for column in row) if not name.startswith("± ")]

    def cell(row: dict[str, float], name: str) -> str:
        value, spread = row.get(name, math.nan), row.get(f"± {name}", math.nan)
        return "" if math.isnan(value) else f"{value:.3f}" + ("" if math.isnan(spread) else f" ± {spread:.3f}")

    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    return "\n".join(lines + [f"| {name} | " + " | ".join(cell(row, column) for column in columns) + " |" for name, row in table.items()]) + "\n"
