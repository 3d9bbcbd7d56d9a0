"""What a release does so that a picture generator does less harm: prompt lists, filters of training data, provenance, audits.

Source: the paper names the risks (section 7) and its release the measures: "DALL-E 2 pre-training mitigations" and the system card (OpenAI
2022). Each of these is a sieve, not a wall; notebook 12 measures how much every one lets through.
"""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

from minunclip.data.files import FORMATS, read_lines
from minunclip.training import write_atomically

# Cyrillic and Greek letters that look Latin; and figures and signs that stand for letters, where a letter follows
LOOK_ALIKES = str.maketrans("авекмнорстухһіјѕ" + "αβεηικνορτυχ", "abekmhopctyxhijs" + "abehikvoptux")
FIGURES = str.maketrans("013457@$!|", "oieastasil")
SIGNATURE = ((255, 255, 102), (66, 255, 255), (81, 218, 76), (255, 110, 60), (60, 70, 255))  # DALL-E 2's five squares
SQUARE = 64  # a square's side is the picture's, divided by this


# ---- prompts ----


def plain(text: str) -> str:
    """A text as it sounds: small letters without accents, look-alikes told apart no more, and spelt-out words (h-e-a-r-t) in one piece."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text).casefold() if not unicodedata.combining(c) and unicodedata.category(c) != "Cf")
    text = text.translate(LOOK_ALIKES)
    text = re.sub(r"[013457@$!|]+(?=[^\W\d_])", lambda found: found[0].translate(FIGURES), text)
    # three or more single letters with the same gap between them are a word that somebody has taken apart
    text = re.sub(r"(?<![^\W_])[^\W_]([\W_]+)[^\W_](?:\1[^\W_])+(?![^\W_])", lambda found: found[0].replace(found[1], ""), text)
    return re.sub(r"[\W_]+", " ", text).strip()


def find_terms(text: str, terms: Sequence[str]) -> list[str]:
    """Those of the terms that stand in the text as whole words, with or without an s, however they are dressed up (see `plain`)."""
    words = f" {plain(text)} "
    return [term for term in terms if plain(term) and re.search(rf" {re.escape(plain(term))}s? ", words)]


def read_terms(path: Path) -> list[str]:
    """A list of terms, one a line; empty lines and those that begin with # do not count. ValueError without any."""
    terms = [line for line in read_lines(path) if not line.startswith("#")]
    if not terms:
        raise ValueError(f"{path} names no terms: write one a line")
    if lost := [term for term in terms if not plain(term)]:
        raise ValueError(f"{path}: {lost[0]!r} has no letter and no figure, and would never be found: write a word")
    return terms


# ---- filters of training data ----


def fit_detector(wanted: Tensor, others: Tensor, penalty: float = 1.0) -> Tensor:
    """A linear probe on embeddings, (d + 1,), that answers 1 for `wanted` (N, d) and 0 for `others` (M, d): ridge regression."""
    z = F.pad(torch.cat([wanted, others]).double(), (0, 1), value=1.0)  # the last for a bias
    label = torch.cat([torch.ones(len(wanted)), torch.zeros(len(others))]).to(z)
    # w = (Z^T Z + penalty I)^-1 Z^T y
    return torch.linalg.solve(z.T @ z + penalty * torch.eye(z.shape[1]).to(z), z.T @ label).float()


def detect(z_i: Tensor, detector: Tensor) -> Tensor:
    """Scores (N,) of embeddings (N, d): near 1 where the concept is seen, near 0 elsewhere."""
    return z_i @ detector[:-1] + detector[-1]


# ---- provenance ----


def save_picture(path: Path, picture: np.ndarray, facts: dict[str, object]) -> None:
    """A PNG, whole or not at all, that says how it was made in its text chunks."""
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, str(value))
    write_atomically(path, lambda temporary: Image.fromarray(picture).save(temporary, format="PNG", pnginfo=info))


def read_facts(path: Path) -> dict[str, str]:
    """What a PNG of ours says of how it was made (caption, seed, weights ...); empty if it says nothing. ValueError if it is no picture."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()  # the facts may stand behind the pixels
            return {str(key): str(value) for key, value in getattr(image, "text", {}).items()}
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, FileNotFoundError):
            raise ValueError(f"{path} is not there") from None
        raise ValueError(f"{path} is no picture that can be read: it may be cut short") from None


def _squares(side: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the five squares at the lower right of a picture of that side, left to right."""
    square = max(1, side // SQUARE)
    return [(slice(side - square, side), slice(side - square * (5 - k), side - square * (4 - k))) for k in range(5)]


def sign(picture: np.ndarray) -> np.ndarray:
    """A copy of a picture, uint8 (S, S, 3), with five coloured squares at the lower right."""
    signed = picture.copy()
    for colour, (rows, columns) in zip(SIGNATURE, _squares(len(picture))):
        signed[rows, columns] = colour
    return signed


def is_signed(picture: np.ndarray, tolerance: float = 40.0) -> bool:
    """Whether the five squares are there, each within `tolerance` (of 255) of its colour on average."""
    if picture.ndim != 3 or picture.shape[0] != picture.shape[1] or picture.shape[2] != 3:
        return False
    found = [picture[rows, columns].reshape(-1, 3).mean(axis=0) for rows, columns in _squares(len(picture))]
    return bool(np.abs(np.array(found) - np.array(SIGNATURE)).max() <= tolerance)


# ---- audits ----


def copied(drawn: Tensor, training: Tensor, fresh: Tensor, share: float = 0.01) -> Tensor:
    """Which drawn pictures (B,) are suspiciously like one of the training pictures, all given as unit-norm embeddings (., d).

    Suspicious is what lies nearer to a training picture than all but `share` of fresh pictures of the same world do, which nobody copied.
    """
    nearest = [(z @ training.T).amax(dim=1) for z in (drawn, fresh)]
    return nearest[0] > nearest[1].quantile(1 - share)


def total_variation(first: dict[str, float], second: dict[str, float]) -> float:
    """How far two distributions lie apart: 0 for the same, 1 for two that share nothing. Half the sum of absolute differences."""
    return sum(abs(first.get(key, 0.0) - second.get(key, 0.0)) for key in first.keys() | second.keys()) / 2
