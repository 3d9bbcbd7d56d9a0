"""What is measured: Fréchet distance, precision and recall, diversity, retrieval, and how often pictures answer their captions.

The paper reports FID and human judgements (section 5). Here features are those of this package's own CLIP, not of an Inception network, so
the Fréchet distances compare only with each other; and instead of people, the caption checker (data/checker.py) counts what is right.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minunclip.data.captions import ATTRIBUTES, LEVELS, Report, caption, describes
from minunclip.data.scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, TEXTURES, Scene, sample_scenes
from minunclip.data.world import HELD_OUT_SEED

CHANCE = {  # of an attribute of a lone thing, or of the background, to be right if it is drawn by lot
    name: 1 / len(values)
    for name, values in {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": SIZES, "position": POSITIONS, "background": BACKGROUNDS}.items()
}


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be (N, d) of at least two pictures, not {tuple(features.shape)}")
    features = features.cpu().double()  # not every accelerator has float64
    return features.mean(dim=0), torch.cov(features.T).reshape(features.shape[1], -1)


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Between the Gaussians fitted to two sets of features (N, d) and (M, d); the FID of Heusel et al. 2017, on features of your choice.

    Too large for few pictures, even where both sets are alike: compare only distances of equal N and M, well above d.
    """
    # |m_a - m_b|^2 + tr(A + B - 2 (A B)^1/2), where A B has the eigenvalues of the symmetric A^1/2 B A^1/2
    (mean_a, a), (mean_b, b) = _moments(features_a), _moments(features_b)
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + a.trace() + b.trace() - 2 * cross)


def kernel_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Between two sets of features (N, d) and (M, d): the KID of Bińkowski et al. 2018, the squared maximum mean discrepancy, on features of your choice.

    Of two sets that are alike it is zero on average, however few the pictures are (so it may be below zero), which the Fréchet distance is not.
    """
    if min(len(features_a), len(features_b)) < 2 or features_a.shape[1:] != features_b.shape[1:]:
        raise ValueError(f"features must be (N, d) and (M, d) of at least two pictures each, not {tuple(features_a.shape)} and {tuple(features_b.shape)}")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        # k(x, y) = (x · y / d + 1)^3
        return (x.cpu().double() @ y.cpu().double().T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        similarity = kernel(x, x)
        return (similarity.sum() - similarity.trace()) / (len(x) * (len(x) - 1))

    # MMD^2 = E k(a, a') + E k(b, b') - 2 E k(a, b), over pairs of different pictures
    return float(within(features_a) + within(features_b) - 2 * kernel(features_a, features_b).mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a.cpu().float(), b.cpu().float(), compute_mode="donot_use_mm_for_euclid_dist")  # the fast way loses what is near


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Kynkäänniemi et al. 2019, on features (N, d) and (M, d). Precision: the share of generated pictures that lie among real ones, within
    the distance of some real one to its k-th nearest real one. Recall: the share of real pictures that lie among generated ones, likewise.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"the {k}-th neighbour needs more than {k} pictures of each, not {len(real)} and {len(generated)}")

    def covered(points: Tensor, by: Tensor) -> float:
        radius = _distances(by, by).kthvalue(k + 1, dim=1).values  # the nearest of all is the point itself
        return float((_distances(points, by) <= radius).any(dim=1).float().mean())

    return covered(generated, by=real), covered(real, by=generated)


def diversity(embeddings: Tensor) -> float:
    """How much pictures of one caption differ: of unit-norm embeddings (captions, N, d), the mean cosine distance of two of the same caption."""
    if embeddings.ndim != 3 or embeddings.shape[1] < 2:
        raise ValueError(f"embeddings must be (captions, pictures of each, d) with two pictures or more, not {tuple(embeddings.shape)}")
    count = embeddings.shape[1]
    similarity = embeddings.float() @ embeddings.float().mT
    others = similarity.sum(dim=(1, 2)) - similarity.diagonal(dim1=1, dim2=2).sum(dim=1)
    return max(0.0, float(1 - (others / (count * (count - 1))).mean()))  # of pictures that are the same, rounding may leave less than nothing


def retrieval(image_embeddings: Tensor, text_embeddings: Tensor, scenes: Sequence[Scene], captions: Sequence[str]) -> dict[str, float]:
    """How often the nearest caption of each picture is true of it, and the nearest picture of each caption fits it.

    Embeddings are (N, d), unit-norm; caption i was written for scene i, but terse captions are true of others too, and those count as right.
    """
    if not len(image_embeddings) == len(text_embeddings) == len(scenes) == len(captions):
        counts = f"{len(image_embeddings)}, {len(text_embeddings)}, {len(scenes)} and {len(captions)}"
        raise ValueError(f"pictures, texts, scenes and captions must be as many, not {counts}")
    similarity = image_embeddings.float() @ text_embeddings.float().T
    texts, images = similarity.argmax(dim=1).tolist(), similarity.argmax(dim=0).tolist()
    return {
        "image_to_text": float(np.mean([i == text or describes(captions[text], scenes[i]) for i, text in enumerate(texts)])),
        "text_to_image": float(np.mean([i == image or describes(captions[i], scenes[image]) for i, image in enumerate(images)])),
    }


def held_out_captions(count: int, seed: int = HELD_OUT_SEED) -> list[tuple[Scene, str]]:
    """Scenes of the held-out split, with captions, from terse to full in turn, that name the combination which no training scene shows."""
    scenes = sample_scenes(count, seed, held_out=True)
    rng = np.random.default_rng([seed, 10])
    return [(scene, caption(scene, LEVELS[i % len(LEVELS)], rng, name_held_out=True)) for i, scene in enumerate(scenes)]


def accuracy(reports: Sequence[Report]) -> dict[str, float]:
    """Of each attribute that was asked for, the share of mentions that came out right; under "all_right", the share of captions of which
    everything did, but for written words: these have a line of their own, "word".
    """
    if not reports:
        raise ValueError("there are no reports to sum up: check at least one picture")
    shares = {}
    for attribute in ATTRIBUTES:
        asked = sum(report.asked.get(attribute, 0) for report in reports)
        if asked:
            shares[attribute] = sum(report.right.get(attribute, 0) for report in reports) / asked
    return {**shares, "all_right": sum(report.all_right for report in reports) / len(reports)}
