"""Checks of the notebooks' exercises: `check("best_candidate", your_function)`.

An exercise that is not begun (it raises NotImplementedError) is let off with a word; a wrong answer raises AssertionError and says why.
"""

import math
from collections.abc import Callable
from typing import Any

import torch


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


CHECKS: dict[str, Callable[[Callable[..., Any]], None]] = {"slowest_stage": slowest_stage, "best_candidate": best_candidate, "margin": margin}
