"""What a training of each stage should look like, and what is off when it looks otherwise: the bands of `data/expected`, held against a log.

`benchmarks/expected.py` trains what the bands come from: the `course` preset, three seeds. A diagnosis reads the curves alone, as a teacher would who
looks over a student's shoulder; it is tested on runs that were broken on purpose. Three faults leave no trace in so short a log, and are not found: a decoder
without latent scale (it adds noise to pictures, and its first layer learns any scale of the embedding), a prior that never dropped its caption, and a
decoder that never dropped what it is told.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from minunclip.training import read_log

EXPECTED = Path(__file__).resolve().parents[1] / "data" / "expected"
FIGURES = ("loss", "validation_loss", "untold_loss", "cosine", "retrieval", "scale", "gradient_norm")  # of a log's lines, those that say how it goes
POSSIBLE = {"cosine": (-1.0, 1.0), "retrieval": (0.0, 1.0), "worth": (-np.inf, np.inf)}  # where a band can lie; the others' are never below 0
UNSEEN = {  # faults after which every curve ends as expected
    "decoder": "a missing latent scale, or a condition that was never dropped",
    "prior": "a caption that was never dropped",
}
Log = Sequence[dict[str, float]]
Curves = dict[str, dict[str, list[float]]]  # by figure: step, low, high


def with_worth(log: Log) -> Log:
    """The log with what the condition is worth, where it was validated: the loss without the condition less that with it."""
    return [line | ({"worth": line["untold_loss"] - line["validation_loss"]} if "untold_loss" in line else {}) for line in log]


def band(logs: Sequence[Log]) -> Curves:
    """How low and how high each figure may be at each step, from logs of the same settings and different seeds: three deviations and 2 % either way,
    as far as there are such values.
    """
    logs = [with_worth(log) for log in logs]
    curves: Curves = {}
    for figure in (*FIGURES, "worth"):
        steps = [line["step"] for line in logs[0] if figure in line]
        if steps:
            values = np.array([[line[figure] for line in log if figure in line] for log in logs])  # (logs, steps)
            middle, variance = values.mean(axis=0), values.var(axis=0, ddof=1)
            near = np.array([variance[max(0, i - 2) : i + 3].mean() for i in range(len(steps))])  # of so few seeds a deviation is itself uncertain
            margin = 3 * np.sqrt(near) + 0.02 * np.abs(middle)
            edges = (np.clip(edge, *POSSIBLE.get(figure, (0.0, np.inf))) for edge in (middle - margin, middle + margin))
            curves[figure] = {"step": steps} | {name: [float(f"{x:.4g}") for x in edge] for name, edge in zip(("low", "high"), edges)}
    return curves


class Compared:
    """A log beside the curves: where each of its figures stands at the end, and how the loss got there."""

    def __init__(self, log: Log, curves: Curves):
        self.log, self.curves = with_worth(log), curves

    def values(self, figure: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a figure in the log."""
        lines = [line for line in self.log if figure in line]
        return np.array([line["step"] for line in lines]), np.array([line[figure] for line in lines])

    def edges(self, figure: str, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        curve = self.curves[figure]
        return np.interp(steps, curve["step"], curve["low"]), np.interp(steps, curve["step"], curve["high"])

    def stands(self, figure: str, part: slice) -> Literal["below", "in the band", "above", "unknown"]:
        """Where a part of the figure's curve lies, in its mean."""
        if figure not in self.curves or not any(figure in line for line in self.log):
            return "unknown"
        steps, values = self.values(figure)
        low, high = (edge[part].mean() for edge in self.edges(figure, steps))
        value = values[part].mean()
        return "below" if value < low else "above" if value > high else "in the band"

    def ends(self, figure: str) -> str:
        """Where its last quarter lies."""
        return self.stands(figure, slice(-max(1, sum(figure in line for line in self.log) // 4), None))

    def steepness(self) -> float:
        """How many times steeper the loss still is at the end than in the band's middle: the median of gradient norms over the last third."""
        steps, norms = self.values("gradient_norm")
        last = slice(-max(1, len(steps) // 3), None)
        low, high = self.edges("gradient_norm", steps)
        return float(np.median(norms[last]) / np.median((low + high)[last] / 2))


def diagnose(log: Log, stage: str) -> tuple[str, str]:
    """What is off in a log of this stage, in a few words, and what one sees it by. ValueError for a log or a stage that has no band."""
    run = Compared(log, expected(stage)["curves"])
    if not log or "loss" not in log[0]:
        raise ValueError("the log has no line with a loss: train for at least 10 steps")
    if not np.isfinite(run.values("loss")[1]).all():
        return "learning rate too high", "the loss is no number any more"
    if run.ends("scale") == "below" and run.values("scale")[1][-1] < 2:
        return "no temperature", "the scale stays near 1, where cosines are too close together to tell pairs apart: learn it, from 1 / 0.07"
    loss, told, untold, cosine, worth = (run.ends(figure) for figure in ("loss", "validation_loss", "untold_loss", "cosine", "worth"))
    if loss == told == "below" and cosine == "below":
        return (
            "no causal mask",
            "the loss is lower than it can be, and what is drawn is worse: in training each token sees the answer, in drawing there is none",
        )
    if loss == told == "below" and run.stands("loss", slice(0, 1)) == "below":
        return (
            "no latent scale",
            "the loss is far too low from the first step on, since the numbers to predict are: multiply embeddings by the root of their dimension",
        )
    if worth != "unknown" and untold != "above" and run.values("worth")[1][-1] < 0:
        return "always dropped", "the model does better without the condition than with it: in training it was dropped every time, and so never learned"
    if "above" in (worth, untold) and told != "above":
        return "never dropped", "without the condition the model is lost: in training it was never dropped, so guidance has no answer to start from"
    if "above" in (loss, told):
        if run.steepness() > 1.3:
            return "learning rate too low", "the loss is above the band and still steep: it has a way to go, in steps too small"
        return "learning rate too high", "the loss is above the band and flat: steps are too large to get any further down"
    if run.steepness() > 2.5:
        return "learning rate too low", "the loss is far steeper than in the band: it has a way to go, in steps too small"
    if "below" in (loss, told):
        return "better than expected", "the loss is below the band: a larger model, other data, or a part of the answer that leaks in"
    return "as expected", "every figure ends in its band"


def expected(stage: str) -> dict:
    """The settings and curves of a stage; ValueError with the stages there are."""
    known = sorted(path.stem for path in EXPECTED.glob("*.json") if not path.stem.endswith("-runs"))
    if stage not in known:
        raise ValueError(f"no expected curves for {stage!r}: choose one of {', '.join(known)}")
    return json.loads((EXPECTED / f"{stage}.json").read_text())


def compare_run(log: Log | Path | str, stage: str | None = None) -> None:
    """Shows a log of training (its lines, or its file) in the band of its stage, and says in words what is off.

    The bands are those of `minunclip train STAGE --preset course`. `stage` is by default the folder that the file is in. ValueError for one that has no band.
    """
    from minunclip.plots import bands_figure, show

    if isinstance(log, Path | str):
        path = Path(log)
        log, stage = read_log(path), stage or path.resolve().parent.name
    if stage is None:
        raise ValueError("lines of a log do not say of which stage they are: give stage=, such as stage='prior'")
    fault, words = diagnose(log, stage)
    run = Compared(log, expected(stage)["curves"])
    ends = (f"{figure.replace('_', ' ')} {run.ends(figure)}" for figure in run.curves if run.ends(figure) != "unknown")
    bands = {figure: curve for figure, curve in run.curves.items() if figure != "untold_loss" and any(figure in line for line in run.log)}
    show(bands_figure(bands, run.log), alt=f"Curves of a training of {stage} in grey bands: {fault}. At the end: {', '.join(ends)}.")
    print(f"{stage}: {fault}; {words}.")
    if fault == "as expected" and stage in UNSEEN:
        print(f"No curve shows {UNSEEN[stage]}: draw pictures, with guidance and without.")
    settings = expected(stage)
    if log[-1]["step"] < settings["steps"]:
        print(f"The run has {log[-1]['step']:g} steps so far, the band {settings['steps']}.")
