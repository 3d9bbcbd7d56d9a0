"""The report of `minunclip evaluate`: how good CLIP, the priors and the pictures are, each figure beside its floor or its baseline.

Paper: section 5. The captions are those of the held-out split, whose combinations of texture, colour and shape no training picture shows,
or your own, of which only that can be said which needs no true picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minunclip.data.captions import LEVELS, caption, compare, parse
from minunclip.data.checker import reader_error
from minunclip.data.render import render
from minunclip.data.scenes import COLOURS, KINDS, OPPOSITE, SHAPES, SIZES, TEXTURES, Scene, kind_of, sample_scenes
from minunclip.data.world import HELD_OUT_SEED, to_tensor, to_uint8
from minunclip.evaluation import accuracy, frechet_distance, held_out_captions, precision_recall, retrieval
from minunclip.pipeline import GUIDANCE, PRIOR_GUIDANCE, PriorName, UnCLIP

BATCH = 50  # pictures that are drawn at once
COSINES = {
    "random_picture": "a random picture, drawn like those of training",
    "z_t": "$z_t$ itself",
    "autoregressive": "the autoregressive prior's $z_i$",
    "diffusion": "the diffusion prior's $z_i$",
    "same_caption": "two of the diffusion prior's for one caption, to each other",
}
FIDELITY = ("fid", "fid_floor", "precision", "recall")
PROBED = {"shape": SHAPES, "colour": tuple(COLOURS), "texture": TEXTURES, "size": SIZES}
ENLARGED = 200  # pictures that are judged after the upsamplers too, in whole batches
PAIRS = 500  # among which CLIP must find the right one


def embed_scenes(model: UnCLIP, scenes: Sequence[Scene], size: int) -> Tensor:
    """z_i (N, d) of scenes drawn at `size`."""
    return torch.cat([model.embed(to_tensor(render(list(scenes[i : i + BATCH]), size))).cpu() for i in range(0, len(scenes), BATCH)])


def clip_figures(model: UnCLIP, count: int = PAIRS, seed: int = HELD_OUT_SEED + 1) -> dict[str, dict[str, float]]:
    """Retrieval among `count` held-out pairs, once with full captions and once with terse ones; see `evaluation.retrieval`."""
    scenes = sample_scenes(count, seed, held_out=True)
    z_i = embed_scenes(model, scenes, model.models["clip"].config.image_size)
    figures = {}
    for level in ("full", "terse"):
        rng = np.random.default_rng([seed, 11])
        captions = [caption(scene, level, rng) for scene in scenes]
        figures[level] = retrieval(z_i, model.read(captions).z_t.cpu(), scenes, captions)
    return figures


def binding(model: UnCLIP, count: int = 300, seed: int = HELD_OUT_SEED + 5) -> float:
    """Of pictures of two things, the share for which CLIP prefers the true caption to the one that has left for right, or above for below.

    Chance is one half. What CLIP does not record here no prior can tell the decoder (section 7 of the paper).
    """
    scenes = [scene for scene in sample_scenes(5 * count, seed, held_out=True) if scene.relation in OPPOSITE][:count]
    z_i = embed_scenes(model, scenes, model.models["clip"].config.image_size)
    true = [caption(scene, "full", np.random.default_rng([seed, i])) for i, scene in enumerate(scenes)]
    false = [caption(replace(scene, relation=OPPOSITE[str(scene.relation)]), "full", np.random.default_rng([seed, i])) for i, scene in enumerate(scenes)]
    scores = [(z_i * model.read(texts).z_t.cpu()).sum(dim=1) for texts in (true, false)]
    return float((scores[0] > scores[1]).float().mean())


def probe(model: UnCLIP, count: int = 9000, seed: int = HELD_OUT_SEED + 6) -> dict[str, float]:
    """How much of a lone thing z_i tells: the share of pictures of which a linear map of z_i, fitted to three in four of them, names each attribute.

    Retrieval does not tell: among random scenes colours and places are enough. Of `count` scenes a third show one thing and no word.
    """
    scenes = [scene for scene in sample_scenes(count, seed) if len(scene.things) == 1 and scene.word is None]
    z_i = F.pad(embed_scenes(model, scenes, model.models["clip"].config.image_size).double(), (0, 1), value=1.0)  # the last for a bias
    fitted, shares = len(scenes) * 3 // 4, {}
    for attribute, names in PROBED.items():
        label = torch.tensor([names.index(getattr(scene.things[0], attribute)) for scene in scenes])
        weights = torch.linalg.lstsq(z_i[:fitted], F.one_hot(label[:fitted], len(names)).double(), driver="gelsd").solution
        shares[attribute] = float(((z_i[fitted:] @ weights).argmax(dim=1) == label[fitted:]).float().mean())
    return shares


def prior_figures(model: UnCLIP, pairs: Sequence[tuple[Scene, str]], seed: int = 0) -> dict[str, dict[str, float]]:
    """Mean cosines to the true z_i, for all captions and by how much they say: of z_t, of each prior's z_i, of a random picture's.

    "same_caption" is the cosine of two draws of the diffusion prior for one caption: the lower, the more they differ. "modality_gap" is the
    distance between the mean z_i and the mean z_t. Pairs are those of `held_out_captions`, whose captions say more and more in turn.
    """
    side = model.models["clip"].config.image_size
    true = embed_scenes(model, [scene for scene, _ in pairs], side)
    text = model.read([words for _, words in pairs])
    seeds = range(seed, seed + len(pairs))
    answers = {"z_t": text.z_t.cpu(), "diffusion": model.draw_embeddings(text, "diffusion", seeds)[0].cpu()}
    if "ar-prior" in model.models:
        answers["autoregressive"] = model.draw_embeddings(text, "autoregressive", seeds)[0].cpu()
    answers["random_picture"] = embed_scenes(model, sample_scenes(len(pairs), seed + 1), side)
    cosines = {name: (answer * true).sum(dim=1) for name, answer in answers.items()}
    again = model.draw_embeddings(text, "diffusion", [2**31 + number for number in seeds])[0].cpu()
    cosines["same_caption"] = (answers["diffusion"] * again).sum(dim=1)
    says = torch.arange(len(pairs)) % len(LEVELS)
    figures = {
        name: {"all": float(cosine.mean()), **{level: float(cosine[says == i].mean()) for i, level in enumerate(LEVELS)}} for name, cosine in cosines.items()
    }
    return {**figures, "modality_gap": {"all": float((true.mean(dim=0) - answers["z_t"].mean(dim=0)).norm())}}


class Judged:
    """Pictures that were drawn for captions, as the checker and CLIP see them."""

    def __init__(self, model: UnCLIP):
        self.model, self.reports, self.z_i, self.z_t = model, [], [], []  # type: ignore[var-annotated]

    def add(self, pictures: np.ndarray, captions: Sequence[str]) -> None:
        """uint8 (B, S, S, 3) and one caption each."""
        seen = self.model.models["checker"].read(to_tensor(pictures))
        self.reports += [compare(parse(text), scene) for text, scene in zip(captions, seen)]
        self.z_i.append(self.model.embed(to_tensor(pictures)).cpu())
        self.z_t.append(self.model.read(captions).z_t.cpu())

    def figures(self, real: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
        """Accuracy by attribute and CLIP score. `real`: z_i of two sets of as many drawn scenes, for the Fréchet distance, precision and
        recall against the first, and for the floor, which is the distance of the two."""
        z_i, z_t = torch.cat(self.z_i), torch.cat(self.z_t)
        figures: dict[str, Any] = {"accuracy": accuracy(self.reports), "clip_score": float((z_i * z_t).sum(dim=1).mean())}
        if real is not None:
            precision, recall = precision_recall(real[0], z_i)
            figures |= {"fid": frechet_distance(real[0], z_i), "fid_floor": frechet_distance(*real), "precision": precision, "recall": recall}
        return figures


def evaluate(
    model: UnCLIP,
    captions: Sequence[str] | None = None,
    count: int = 1000,
    seed: int = 0,
    size: int | None = None,
    prior: PriorName = "diffusion",
    guidance: float = GUIDANCE,
    enlarged: int = ENLARGED,
    progress: Callable[[str], None] = lambda line: None,
    look: Callable[[np.ndarray], None] = lambda pictures: None,
) -> dict[str, Any]:
    """Every figure that can be had for the captions; without captions, for `count` scenes of the held-out split, of which most can be said.

    Pictures are drawn up to `size` and judged at every size on the way; beyond the decoder's, which takes most of the time, the first `enlarged` of
    them. `seed` is that of the first picture, the next has the next. `look` sees the pictures of each batch, as large as they were drawn.
    ValueError without a checker among the weights.
    """
    if "checker" not in model.models:
        raise ValueError("these weights have no checker, which evaluation needs: train and pack the stage checker")
    size = model.size_for(size)
    pairs = held_out_captions(count) if captions is None else None
    texts = list(captions or ()) if pairs is None else [text for _, text in pairs]
    model.seeds_for(range(seed, seed + len(texts)), len(texts))  # said now, and not after CLIP and priors are measured
    figures: dict[str, Any] = {"captions": len(texts), "seed": seed, "prior": prior, "guidance": guidance, "prior_guidance": PRIOR_GUIDANCE}
    if pairs is not None:
        figures |= {"clip": clip_figures(model), "binding": binding(model), "probe": probe(model), "prior_cosine": prior_figures(model, pairs, seed)}
        progress("CLIP and priors measured")
    judged: dict[str, Judged] = {}
    for i in range(0, len(texts), BATCH):
        part = texts[i : i + BATCH]
        seeds = range(seed + i, seed + i + len(part))
        drawn = model.generate(part, prior, seeds, size if i < enlarged else model.sizes[0], guidance).pictures
        look(drawn[max(drawn)])
        for side, pictures in drawn.items():
            judged.setdefault(str(side), Judged(model)).add(pictures, part)
        if pairs is not None:  # the same, but for a prior: z_t stands in the place of z_i
            text = model.read(part)
            bare = model.decode(text.z_t, text, [4 * number + 1 for number in seeds], guidance)
            judged.setdefault("without_prior", Judged(model)).add(to_uint8(bare), part)
        progress(f"{i + len(part)} of {len(texts)} captions drawn")
    figures["pictures"] = {}
    for name, one in judged.items():
        side = model.sizes[0] if name == "without_prior" else int(name)
        scenes = [sample_scenes(len(one.reports), HELD_OUT_SEED + k, held_out=True) for k in (2, 3)]
        real = None if pairs is None else (embed_scenes(model, scenes[0], side), embed_scenes(model, scenes[1], side))
        reader, where = model.models["checker"], (1000, HELD_OUT_SEED + 4, side)
        figures["pictures"][name] = {"captions": len(one.reports), **one.figures(real), "checker_error": reader_error(reader, *where)}
        if pairs is not None:
            kinds = [kind_of(scene) for scene, _ in pairs]
            of_kind = {kind: [report for report, own in zip(one.reports, kinds) if own == kind] for kind in KINDS}
            figures["pictures"][name]["by_kind"] = {
                kind: {"captions": len(reports), **accuracy(reports), "checker_error": reader_error(reader, *where, kind)["all_right"]}
                for kind, reports in of_kind.items()
                if reports
            }
    return figures


def as_text(figures: dict[str, Any]) -> str:
    """The figures as tables for a terminal, in percent where they are shares."""
    lines = []
    for level, found in figures.get("clip", {}).items():
        directions = ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in found.items())
        lines.append(f"CLIP, right one first of {PAIRS}, {level} captions: {directions}")
    if "binding" in figures:
        lines.append(f"CLIP, the right one of two captions that differ in the relation alone: {figures['binding']:.1%} (by chance 50 %)")
    for attribute, share in figures.get("probe", {}).items():
        lines.append(f"CLIP, {attribute} of a lone thing read off z_i by a linear map: {share:.1%} (by chance {1 / len(PROBED[attribute]):.0%})")
    for name, cosines in figures.get("prior_cosine", {}).items():
        lines.append(f"cosine to the true z_i, {name}: " + ", ".join(f"{level} {value:.3f}" for level, value in cosines.items()))
    for name, found in figures["pictures"].items():
        wrong = found["checker_error"]
        lines.append(
            f"pictures, {name}, {found['captions']:,} captions: CLIP score {found['clip_score']:.3f}"
            + "".join(f", {key} {found[key]:.4f}" for key in FIDELITY if key in found)
        )
        lines += [
            f"  {attribute:<10} right {share:6.1%}  (the checker errs in {wrong.get(attribute, 0):.1%})" for attribute, share in found["accuracy"].items()
        ]
        for kind, part in found.get("by_kind", {}).items():
            shares = f"all right {part['all_right']:6.1%}, shape {part['shape']:6.1%}" if "shape" in part else f"all right {part['all_right']:6.1%}"
            lines.append(f"  {kind + ',':<19} {part['captions']:>3} captions: {shares}  (the checker errs in {part['checker_error']:.1%})")
    return "\n".join(lines)


def as_markdown(figures: dict[str, Any]) -> str:
    """The figures as the tables of README.md."""
    lines = [f"| CLIP: right one first of {PAIRS} held-out pairs | picture to caption | caption to picture |", "|---|---|---|"]
    lines += [f"| {level} captions | {found['image_to_text']:.1%} | {found['text_to_image']:.1%} |" for level, found in figures["clip"].items()]
    lines.append(f"| the right one of two captions with opposite relations (by chance 50 %) | {figures['binding']:.1%} | |")
    lines += ["", "| of a lone thing a linear map of $z_i$ reads the | " + " | ".join(PROBED) + " |", "|---|" + "---|" * len(PROBED)]
    lines.append("| share right | " + " | ".join(f"{figures['probe'][attribute]:.1%}" for attribute in PROBED) + " |")
    lines.append("| by chance | " + " | ".join(f"{1 / len(names):.1%}" for names in PROBED.values()) + " |")
    lines += ["", "| cosine to the true $z_i$ | " + " | ".join(["all", *LEVELS]) + " |", "|---|" + "---|" * (1 + len(LEVELS))]
    for name, title in COSINES.items():
        if name in figures["prior_cosine"]:
            lines.append(f"| {title} | " + " | ".join(f"{figures['prior_cosine'][name][level]:.3f}" for level in ("all", *LEVELS)) + " |")
    lines += ["", f"The mean embeddings of pictures and of captions are {figures['prior_cosine']['modality_gap']['all']:.3f} apart (the modality gap)."]
    sizes = [name for name in figures["pictures"] if name != "without_prior"]
    smallest, largest = sizes[0], sizes[-1]
    pictures = {name: figures["pictures"][name] for name in dict.fromkeys((smallest, largest, "without_prior"))}
    titles = [f"without a prior, {smallest}" if name == "without_prior" else f"{name} × {name}" for name in pictures]
    titles = [
        title + (f", the first {found['captions']}" if found["captions"] < figures["captions"] else "") for title, found in zip(titles, pictures.values())
    ]
    lines += ["", f"| {figures['captions']:,} held-out captions | " + " | ".join(titles) + f" | checker's own error, {smallest} | {largest} |"]
    lines.append("|---|" + "---|" * (2 + len(pictures)))
    for attribute in pictures[smallest]["accuracy"]:
        shares = " | ".join(f"{found['accuracy'][attribute]:.1%}" if attribute in found["accuracy"] else "" for found in pictures.values())
        title = "all but words at once" if attribute == "all_right" else attribute
        errors = " | ".join(f"{pictures[size]['checker_error'].get(attribute, 0):.1%}" for size in (smallest, largest))
        lines.append(f"| {title} right | {shares} | {errors} |")
    for key, title in (("fid", "Fréchet distance in CLIP's space"), ("fid_floor", "its floor: two sets of drawn scenes")):
        lines.append(f"| {title} | " + " | ".join(f"{found[key]:.4f}" for found in pictures.values()) + " | | |")
    for key in ("precision", "recall"):
        lines.append(f"| {key} | " + " | ".join(f"{found[key]:.1%}" for found in pictures.values()) + " | | |")
    lines += ["", "| all but words right, by what is asked for | captions | " + " | ".join(titles) + f" | checker's own error, {smallest} |"]
    lines.append("|---|---|" + "---|" * (1 + len(pictures)))
    for kind, part in pictures[smallest]["by_kind"].items():
        shares = " | ".join(f"{found['by_kind'][kind]['all_right']:.1%}" if kind in found["by_kind"] else "" for found in pictures.values())
        lines.append(f"| {kind} | {part['captions']} | {shares} | {part['checker_error']:.1%} |")
    return "\n".join(lines) + "\n"
