"""Aesthetic quality: a linear probe on CLIP's embeddings that has learned what raters like.

Paper: section 5.5, where the ratings are people's (the AVA data set). Nobody has rated this world, so here they are simulated, by a rule that is
written down (`taste`); the probe never sees the rule, only pictures' z_i and noisy ratings. It learns from your own ratings just as well.
"""

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Probe = Callable[[Tensor], Tensor]  # z_i (B, d) to ratings (B,)
SPREAD = 0.5  # how far two raters of one picture are apart: the standard deviation of simulated ratings about the rule
RIDGE = 1e-3  # of the mean square of an embedding's value: keeps directions that no picture shows from being believed


def taste(images: Tensor) -> Tensor:
    """The rule that stands for the raters: contrast and symmetry count alike. Pictures (B, 3, H, W) in [-1, 1] to ratings of 1 to 10, (B,)."""
    grey = (images.mean(dim=1) + 1) / 2
    contrast = 2 * grey.std(dim=(1, 2), correction=0)  # 1 where half is black and half white
    symmetry = 1 - (grey - grey.flip(2)).abs().mean(dim=(1, 2))  # 1 where left mirrors right
    return 1 + 9 * (contrast + symmetry) / 2


def simulated_ratings(images: Tensor, rng: np.random.Generator) -> Tensor:
    """One rater's ratings (B,): the rule, and a mood."""
    return taste(images) + SPREAD * torch.from_numpy(rng.standard_normal(len(images))).to(images)


def fit_probe(z_i: Tensor, ratings: Tensor) -> Probe:
    """Ridge regression of ratings (N,) on unit-norm embeddings (N, d). ValueError for fewer than two, or for other numbers of both."""
    if len(z_i) != len(ratings) or len(z_i) < 2:
        raise ValueError(f"{len(z_i)} pictures and {len(ratings)} ratings: give as many of each, two at least")
    middle, mean = z_i.double().mean(dim=0), ratings.double().mean()
    x = z_i.double() - middle
    # w = (X^T X + N r I)^-1 X^T y,  r a small part of the mean square of an embedding's value, 1 / d
    dim = x.shape[1]
    weight = torch.linalg.solve(x.T @ x + len(x) * RIDGE / dim * torch.eye(dim).to(x), x.T @ (ratings.double() - mean))
    return lambda z_i: ((z_i.double() - middle) @ weight + mean).float()


def read_ratings(path: Path) -> list[tuple[Path, float]]:
    """Pictures with ratings from a CSV with the columns `file_name` (from its own folder) and `rating`. ValueError names the line that is not so."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        found = []
        try:
            if not {"file_name", "rating"} <= set(rows.fieldnames or ()):
                raise ValueError(f"{path} must have the columns file_name and rating in its first line")
            for row in rows:
                try:
                    rating = float(row["rating"])
                except (TypeError, ValueError):
                    rating = math.nan
                if not math.isfinite(rating):
                    raise ValueError(f"{path}, line {rows.line_num}: {row['rating']!r} is no number")
                if any(row.get(None) or ()):  # type: ignore[call-overload]
                    raise ValueError(f"{path}, line {rows.line_num}: more fields than in the first line: write 3.5, not 3,5")
                if not row["file_name"]:
                    raise ValueError(f"{path}, line {rows.line_num}: no file_name")
                found.append((path.parent / row["file_name"], rating))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no CSV in UTF-8: {error}") from None
    if len(found) < 2:
        raise ValueError(f"{path} has {len(found)} ratings: two pictures at least")
    return found
