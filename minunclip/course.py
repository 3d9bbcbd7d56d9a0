"""Checks of the notebooks' exercises: `check("best_candidate", your_function)`.

An exercise that is not begun (it raises NotImplementedError) is let off with a word; a wrong answer raises AssertionError and says why.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from minunclip.data.captions import describes
from minunclip.data.scenes import sample_scenes


def check(exercise: str, attempt: Callable[..., Any]) -> bool:
    """Whether the exercise is solved. ValueError for an exercise that there is not; AssertionError explains a wrong answer."""
    if exercise not in CHECKS:
        raise ValueError(f"there is no exercise {exercise!r}: choose one of {', '.join(CHECKS)}")
    try:
        CHECKS[exercise](attempt)
    except NotImplementedError:
        print(f"{exercise}: not attempted yet")
        return False
    print(f"{exercise}: right")
    return True


# ---- 00 tour ----


def slowest_stage(attempt: Callable[..., Any]) -> None:
    for seconds, right in (({"text": 0.1, "decoder": 2.0, "prior": 0.3}, "decoder"), ({"prior": 1.0, "decoder": 0.5}, "prior")):
        got = attempt(seconds)
        assert got == right, f"of {seconds} the slowest stage is {right!r}, but the answer was {got!r}: return the key, not its value"


def best_candidate(attempt: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    z_t = torch.nn.functional.normalize(torch.randn(5, 8, generator=generator), dim=1)
    candidates = torch.nn.functional.normalize(torch.randn(5, 3, 8, generator=generator), dim=2)
    got = attempt(z_t, candidates)
    assert isinstance(got, torch.Tensor) and got.shape == (5, 8), "return one embedding a caption, a tensor (B, d): index the candidates, do not score them"
    right = torch.stack([max(options, key=lambda z: float(z @ text)) for text, options in zip(z_t, candidates)])
    least = torch.stack([min(options, key=lambda z: float(z @ text)) for text, options in zip(z_t, candidates)])
    assert not torch.allclose(got, least), "these agree least with z_t: take the largest z_i . z_t, not the smallest"
    assert torch.allclose(got, right), "each caption has its own best candidate, the one with the largest z_i . z_t"


def margin(attempt: Callable[..., Any]) -> None:
    for right, count in ((50, 100), (90, 100), (950, 1000), (0, 10)):
        share = right / count
        expected, got = 1.96 * math.sqrt(share * (1 - share) / count), attempt(right, count)
        off = f"of {right} right out of {count} the margin is {expected:.4f}, not {got:.4f}"
        assert abs(got - expected) < 1e-3, f"{off}: 1.96 times the square root of p (1 - p) / n"


# ---- 01 a world with captions, and byte-pair encoding ----


def most_frequent_pair(attempt: Callable[..., Any]) -> None:
    cases: list[tuple[dict[tuple[int, ...], int], tuple[int, int]]] = [
        ({(2, 3, 2, 3): 5, (3, 2): 4}, (2, 3)),
        ({(5, 5, 5): 2, (4, 6): 3}, (5, 5)),
        ({(9, 8): 1, (7, 8): 1}, (7, 8)),
    ]
    for words, right in cases:
        got = attempt(dict(words))
        advice = "count each pair as often as its word, and of equals take the lowest"
        assert tuple(got) == right, f"in {words} the most frequent pair is {right}, not {got}: {advice}"


def share_allowed(attempt: Callable[..., Any]) -> None:
    scenes = sample_scenes(200, seed=21)
    for words in ("a shape", "a red circle", "two shapes", "a striped shape"):
        right, got = sum(describes(words, scene) for scene in scenes) / len(scenes), attempt(words, scenes)
        assert abs(got - right) < 1e-9, f"{words!r} is true of {right:.1%} of these scenes, not of {got}: divide by the number of scenes"


def pad(attempt: Callable[..., Any]) -> None:
    rows = [[5, 6, 7], [8], [9, 3]]
    ids, mask = attempt(rows)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0], [9, 3, 0]], f"ids must be the rows, filled up with 0 to the longest, not {ids.tolist()}"
    assert mask.dtype == torch.bool, "mask must be of booleans: True for real tokens"
    assert mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]], "mask must be True on real tokens, and nowhere else"


CHECKS: dict[str, Callable[[Callable[..., Any]], None]] = {
    function.__name__: function for function in (slowest_stage, best_candidate, margin, most_frequent_pair, share_allowed, pad)
}
