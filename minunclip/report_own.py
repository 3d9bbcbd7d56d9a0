"""The report of `minunclip data evaluate`: how good a training on your own pictures is, on those it learned from and on those held out, apart.

Nobody can check such captions exactly, so all figures are CLIP's own: they compare trainings with one CLIP, and only those. What only the learned
pictures do well was learned by heart; the nearest training picture beside each drawn one shows it to the eye, as Carlini et al. 2023 do.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minunclip.data.world import Pictures, World, to_tensor, to_uint8
from minunclip.evaluation import frechet_distance
from minunclip.models.clip import same_captions
from minunclip.pipeline import GUIDANCE, UnCLIP
from minunclip.safety import copied

BATCH = 50  # pictures that are drawn at once
SHOWN = 16  # pictures of each set on the sheet
TITLES = {
    "picture_to_caption": "CLIP finds the caption of a picture",
    "caption_to_picture": "CLIP finds the picture of a caption",
    "chance": "by chance",
    "prior": "cosine of the prior's $z_i$ to the true one",
    "z_t": "cosine of $z_t$ to it",
    "another": "cosine of another picture's $z_i$ to it",
    "clip_score": "CLIP score of pictures drawn from captions",
    "clip_score_true": "CLIP score of the true pictures",
    "fid": "Fréchet distance in CLIP's space, drawn from captions",
    "fid_from_embeddings": "the same, drawn from true $z_i$",
    "fid_floor": "the same, of true pictures of the other set",
    "copied": "drawn pictures nearer to a training picture than 99 % of those held out are",
}
Figures = dict[str, dict[str, float]]


def evaluate_own(
    model: UnCLIP, world: World, count: int = 256, seed: int = 0, guidance: float = GUIDANCE, progress: Callable[[str], None] = lambda line: None
) -> tuple[Figures, list[np.ndarray], list[str]]:
    """The figures of TITLES for `count` pictures, at most, that were learned from, and as many held out; a sheet of pictures, and its titles.

    The sheet has, for the first of each set, none left out, rows of true pictures, of what is drawn from their captions, and of the training pictures
    that are nearest to these in CLIP's space. ValueError where `world` is the captioned one, which holds no pictures out.
    """
    if world.held is None:
        raise ValueError(f"{world.folder} holds the captioned world, of which `minunclip evaluate` knows more")
    held, count = world.held, min(count, len(world.held["pictures"]), len(world))
    some = np.sort(np.random.default_rng([seed, 12]).choice(len(world), count, replace=False))
    sets = {
        "learned": (world.pictures[some], world.small[some], world.captions[some, 0]),
        "held out": (held["pictures"][:count], held["small"][:count], held["captions"][:count, 0]),
    }
    training, fresh = _embed(model, world.small), _embed(model, held["small"])
    true = {name: _embed(model, small) for name, (_, small, _) in sets.items()}
    figures, sheet, titles = {}, [], []  # type: ignore[var-annotated]
    for (name, (pictures, small, captions)), other in zip(sets.items(), reversed(sets)):
        tokens = torch.from_numpy(captions.astype(np.int64))
        texts = [world.tokenizer.decode(row) for row in tokens.tolist()]
        z_i, text = _embed(model, pictures), model.read(texts)
        z_t, answer = text.z_t.cpu(), model.draw_embeddings(text, "diffusion", [4 * number for number in range(seed, seed + count)])[0].cpu()
        drawn = {}
        for source, embedding in (("caption", answer), ("embedding", z_i)):
            parts = []
            for i in range(0, count, BATCH):
                part = slice(i, min(count, i + BATCH))
                numbers = [4 * number + 1 for number in range(seed + part.start, seed + part.stop)]  # as `generate` has them
                parts.append(to_uint8(model.decode(embedding[part].to(model.device), model.read(texts[part]), numbers, guidance)))
                progress(f"{name}: {part.stop} of {count} pictures drawn from each {source}")
            drawn[source] = np.concatenate(parts)
        made = _embed(model, drawn["caption"])
        similarity, same = z_i @ z_t.T, same_captions(tokens)
        rows = torch.arange(count)
        figures[name] = {
            "picture_to_caption": _share(same[rows, similarity.argmax(dim=1)]),
            "caption_to_picture": _share(same[similarity.argmax(dim=0), rows]),
            "chance": _share(same),
            "prior": _cosine(answer, z_i),
            "z_t": _cosine(z_t, z_i),
            "another": _cosine(z_i.roll(1, dims=0), z_i),
            "clip_score": _cosine(made, z_t),
            "clip_score_true": _cosine(true[name], z_t),
            "fid": frechet_distance(made, true[name]),
            "fid_from_embeddings": frechet_distance(_embed(model, drawn["embedding"]), true[name]),
            "fid_floor": frechet_distance(true[other], true[name]),
            "copied": _share(copied(made, training, fresh)),
        }
        nearest = world.small[(made[:SHOWN] @ training.T).argmax(dim=1).numpy()]
        for i in range(0, min(SHOWN, count), 8):
            row = slice(i, i + 8)
            sheet += [*small[row], *drawn["caption"][row], *nearest[row]]
            titles += [*texts[row], *["drawn"] * len(small[row]), *["nearest learned"] * len(small[row])]
    return figures, sheet, titles


@torch.no_grad()
def _embed(model: UnCLIP, pictures: Pictures) -> Tensor:
    return torch.cat([model.embed(to_tensor(pictures[i : i + BATCH].copy())).cpu() for i in range(0, len(pictures), BATCH)])


def _share(flags: Tensor) -> float:
    return float(flags.float().mean())


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dim=1).mean())


def as_markdown(figures: Figures) -> str:
    """The figures as a table, shares in percent."""
    shares = ("picture_to_caption", "caption_to_picture", "chance", "copied")
    lines = ["| | " + " | ".join(figures) + " |", "|---|" + "---|" * len(figures)]
    for name, title in TITLES.items():
        lines.append(f"| {title} | " + " | ".join(f"{found[name]:.1%}" if name in shares else f"{found[name]:.3f}" for found in figures.values()) + " |")
    return "\n".join(lines) + "\n"
